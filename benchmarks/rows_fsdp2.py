"""Rows: what plugins add to a step of sharded parameters, on two processes of one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import fsdp2
from benchmarks.interleave import Timings
from benchmarks.rows_unclipped import chain
from benchmarks.table import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort
    from benchmarks.workloads import Workload

_TARGETS = {"tiny": {"zclip": 0.60}}


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure zclip and the chain of the unclipped rows; the processes have one thread each."""
    if torch.get_num_threads() != 1:
        return
    timings = _measured(workload, effort)
    names = {"zclip": "zclip", "chain": " + ".join(p.partition(":")[0] for p in chain())}
    for case, what in names.items():
        yield Row(
            f"{what}, added to fused AdamW under FSDP2 on 2 processes, nothing clipped",
            timings.added(case, "bare"),
            workload.name,
            "what clip_grad_norm_ adds there",
            timings.added("clip_grad_norm_", "bare"),
            _TARGETS.get(workload.name, {}).get(case),
        )


def _measured(workload: Workload, effort: Effort) -> Timings:
    clock = "cpu" if effort.cpu_clock else "wall"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [workload.name, str(effort.repetitions(workload)), clock, folder]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fsdp2", str(rank), *arguments],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            )
            for rank in range(fsdp2.WORLD)
        ]
        if any([rank.wait() for rank in ranks]):
            raise RuntimeError("a process of the rows under FSDP2 failed; see what it said")
        return Timings(json.loads((Path(folder) / "seconds.json").read_text()))
