"""Rows: AdaGC on fused AdamW against an optimizer that has it built in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_optimizer import AdaGC

import stablekit
from benchmarks.interleave import Case
from benchmarks.table import Row
from benchmarks.workloads import FusedAdamW, Tensors, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort

_WARMUP = 2


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure whole steps past the warm-up, on gradients that vary: some tensors are clipped."""
    tensors = Tensors(workload, keep_source=True)
    ours = stablekit.wrap(FusedAdamW(tensors)(), f"adagc:warmup_steps={_WARMUP}")
    theirs = AdaGC(tensors.params, lr=1e-6, warmup_steps=_WARMUP, lambda_rel=1.04, beta=0.99)
    cases = [
        Case("ours", ours.step, tensors.vary),
        Case("theirs", lambda: theirs.step(), tensors.vary),
    ]
    timings = effort.time(cases, effort.repetitions(workload, slow=True))
    yield Row(
        "adagc on fused AdamW, whole step",
        timings.median("ours"),
        workload.name,
        "step of pytorch_optimizer's AdaGC",
        timings.median("theirs"),
        0.40,
    )
