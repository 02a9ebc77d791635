"""All rows, and a run of them in a fresh process for each number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import (
    rows_adagc,
    rows_agc,
    rows_autoclip,
    rows_clipped,
    rows_device,
    rows_fsdp2,
    rows_peers,
    rows_qk_clip,
    rows_recorder,
    rows_stable_spam,
    rows_start,
    rows_unclipped,
    rows_updates,
)
from benchmarks.table import Row
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.effort import Effort

_ON_WORKLOADS = {
    "unclipped": rows_unclipped.rows,
    "fsdp2": rows_fsdp2.rows,
    "clipped": rows_clipped.rows,
    "agc": rows_agc.rows,
    "adagc": rows_adagc.rows,
    "peers": rows_peers.rows,
    "recorder": rows_recorder.rows,
    "stable-spam": rows_stable_spam.rows,
    "updates": rows_updates.rows,
    "qk-clip": rows_qk_clip.rows,
}
ROWS = (*_ON_WORKLOADS, "autoclip", "start", "device")


def run_here(
    names: Sequence[str], workloads: Sequence[str], threads: int, effort: Effort
) -> Iterator[Row]:
    """Measure rows in this process, which from now on has so many threads."""
    torch.set_num_threads(threads)
    for name in names:
        for row in _rows(name, workloads, effort):
            print(f"  {threads} threads: {row.what} [{row.workload}]", file=sys.stderr)
            yield replace(row, threads=threads)


def run_apart(
    names: Sequence[str], workloads: Sequence[str], threads: int, effort: Effort
) -> list[Row]:
    """Measure rows in a fresh process with so many threads."""
    command = [sys.executable, "-m", "benchmarks", "--json", f"--threads={threads}"]
    command += [f"--rows={','.join(names)}", f"--workloads={','.join(workloads)}"]
    command += ["--quick"] if effort.quick else []
    command += ["--clock=cpu"] if effort.cpu_clock else []
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return [Row(**fields) for fields in json.loads(done.stdout)]


def as_json(rows: Sequence[Row]) -> str:
    """Return rows in the form in which a process hands them to the one that started it."""
    return json.dumps([asdict(row) for row in rows])


def _rows(name: str, workloads: Sequence[str], effort: Effort) -> Iterator[Row]:
    if name == "autoclip":
        yield from rows_autoclip.rows(effort)
    elif name == "start":
        yield from rows_start.rows(effort)
    elif name == "device":
        yield from rows_device.rows()
    else:
        for workload in workloads:
            yield from _ON_WORKLOADS[name](WORKLOADS[workload], effort)
