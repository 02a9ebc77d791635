"""Rows: how long a new process waits, each figure from fresh processes started in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.table import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort

_IMPORT = """
import torch
from time import {clock} as clock
start = clock()
import stablekit
print(clock() - start)
"""
_FIRST_STEP = """
import torch, stablekit
from time import {clock} as clock
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 64)).sum().backward()
start = clock()
{attach}
optimizer.step()
print(clock() - start)
"""


def rows(effort: Effort) -> Iterator[Row]:
    """Measure the import on top of torch's, and attaching by name with the first step."""
    clock = "thread_time" if effort.cpu_clock else "perf_counter"
    programs = {
        "import stablekit, on top of torch": _IMPORT.format(clock=clock),
        "attach zclip by name and first step": _FIRST_STEP.format(
            clock=clock, attach='stablekit.attach(optimizer, "zclip")'
        ),
        "first step of AdamW alone": _FIRST_STEP.format(clock=clock, attach=""),
    }
    targets = dict(zip(programs, (0.10, 0.30), strict=False))
    seconds: dict[str, list[float]] = {what: [] for what in programs}
    for _ in range(effort.processes):
        for what, program in programs.items():
            seconds[what].append(_seconds(program))
    for what, each in seconds.items():
        yield Row(what, statistics.median(each), target=targets.get(what))


def _seconds(program: str) -> float:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)
