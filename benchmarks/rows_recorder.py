"""Rows: what a Recorder adds to a step in which the norms are read anyway."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import TYPE_CHECKING

import torch

import stablekit
from benchmarks.interleave import Case
from benchmarks.table import Row
from benchmarks.workloads import TINY, FusedAdamW, Tensors, Workload, free
from stablekit_monitors import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort
    from stablekit import Session

_STEPS = 1024  # what fills a file, so that each block writes one
_TARGETS = {"gpt2": 1.0}  # a per cent of the step


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure whole blocks of steps, files included, against one step with the norms read.

    What is added depends on the number of tensors only, so it is measured on small ones, where
    a per cent of a large step does not drown in that step's noise.
    """
    tensors = Tensors(workload)
    optimizer = FusedAdamW(tensors)()
    stablekit.attach(optimizer)
    timings = effort.time([Case("norms", optimizer.step)], effort.repetitions(workload))
    yield Row(
        "recorder, added to 100 steps, files included",
        100 * _added(effort),
        workload.name,
        "one step of fused AdamW, norms read",
        timings.median("norms"),
        _TARGETS.get(workload.name),
    )


def _added(effort: Effort) -> float:
    tensors = Tensors(TINY)
    chain = ["nonfinite-guard", "zclip:warmup_steps=2"]
    with tempfile.TemporaryDirectory() as folder:
        bare = stablekit.attach(free(tensors), *chain)
        recorded = stablekit.attach(free(tensors), *chain, Recorder(folder))
        cases = [
            Case("bare", partial(_block, bare)),
            Case("recorded", partial(_block, recorded)),
        ]
        timings = effort.time(cases, max(effort.blocks // 4, 1), warmup=1)
        recorded.detach()
    return timings.added("recorded", "bare") / _STEPS


def _block(session: Session) -> None:
    loss, (optimizer,) = torch.ones(()), session.optimizers
    for _ in range(_STEPS):
        session.observe(loss=loss)
        optimizer.step()
