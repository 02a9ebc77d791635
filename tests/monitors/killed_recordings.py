"""Record in child processes and kill each of them: ``FOLDER SEED``. Prints what is wrong, if any.

The gradient of step n is n and its loss -n; every 10th step has an event. Each child goes on from a
step somewhat before the one where the child before it was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch

import stablekit
from stablekit_monitors import JSONLines, Recorder, RunLog, RunReader, read_run

CHILDREN = 4
CHUNK = 40
LIMITS = {"unlimited": None, "limited": 80_000}


class Clock:
    """Emits an event every 10th step."""

    name = "clock"

    @stablekit.hookimpl
    def observe_gradients(self, step: stablekit.Step) -> None:
        if step.number % 10 == 0:
            step.emit("tick", mark=float("inf"))


def record(folder: Path, first: int, limit: int | None) -> None:
    """Record from a step on, until killed; at the latest when there is nobody to do so."""
    parent = os.getppid()
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([("p", p)], lr=0.0)
    recorder = Recorder(folder, chunk=CHUNK, flush_seconds=0.01, max_bytes=limit)
    lines = JSONLines(folder / "lines.jsonl")
    session = stablekit.attach(optimizer, Clock(), recorder, lines)
    if first > 1:
        session.load_state_dict({**session.state_dict(), "number": first - 1, "updates": first - 1})
    while os.getppid() == parent:
        number = session.number + 1
        p.grad = torch.full((1,), float(number))
        session.observe(loss=-float(number))
        optimizer.step()


def kill_one(folder: Path, first: int, limit: int | None, steps: int) -> list[str]:
    """Let a child record so many steps while its run is read, kill it, return what is wrong."""
    lines = folder / "lines.jsonl"
    lines.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        record(folder, first, limit)
        os._exit(1)
    problems, reader = [], None
    while last_line(lines) < first + steps:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return ["the child ended by itself"]
        if reader is None and (folder / "run.json").exists():
            reader = RunReader(folder)
        if reader is not None:
            problems += wrong_with(reader.update(), limit)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    log = read_run(folder)
    lost = last_line(lines) - (int(log.steps[-1]) if len(log) else 0)
    if lost > CHUNK:
        problems.append(f"{lost} steps were lost")
    return problems + wrong_with(log, limit)


def wrong_with(log: RunLog, limit: int | None) -> list[str]:
    """Return in what a record differs from the run."""
    gaps = np.diff(log.steps, prepend=0)
    ticks = [event.step for event in log.events if event.kind == "tick"]
    found = {
        "steps are missing or twice": limit is None and bool((gaps != 1).any()),
        "rows stand for more steps than there were": bool((log.stride > gaps).any()),
        "norms": len(log) > 0 and not np.array_equal(log.norms[:, 0], log.steps),
        "losses": len(log) > 0 and not np.array_equal(log.scalars["loss"], -log.steps),
        "an event twice": len(set(ticks)) < len(ticks),
        "events": any(e.data["mark"] != np.inf for e in log.events if e.kind == "tick"),
        "an event is missing": limit is None and ticks != list(range(10, 10 * len(ticks) + 1, 10)),
    }
    return [name for name, is_wrong in found.items() if is_wrong]


def last_line(path: Path) -> int:
    """Return the step of the last whole line, 0 if there is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def main(folder: Path, seed: int) -> None:
    """Kill children one after another, in a folder for each limit."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], lr=0.0).step()  # what torch imports late is there now
    draw = random.Random(seed)
    for name, limit in LIMITS.items():
        path, first = folder / name, 1
        for number in range(CHILDREN):
            problems = kill_one(path, first, limit, draw.randrange(40, 160))
            log = read_run(path)
            print(f"{name} {number}: {len(log)} rows, {[*dict.fromkeys(problems)] or 'fine'}")
            last = int(log.steps[-1]) if len(log) else 0
            first = max(last - draw.randrange(2 * CHUNK), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
