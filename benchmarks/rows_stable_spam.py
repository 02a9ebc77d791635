"""Rows: Stable-SPAM on fused AdamW against an optimizer that has it built in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_optimizer import StableSPAM

import stablekit
from benchmarks.interleave import Case
from benchmarks.table import Row
from benchmarks.workloads import FusedAdamW, Tensors, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure whole steps on gradients that vary: in about half of the tensors elements stand out.

    The peer lowers no outlier: it writes to a copy of the selected elements. Its step is measured
    as it is.
    """
    tensors = Tensors(workload, keep_source=True)
    ours = stablekit.wrap(FusedAdamW(tensors)(), "stable-spam")
    theirs = StableSPAM(tensors.params, lr=1e-6)
    cases = [
        Case("ours", ours.step, tensors.vary),
        Case("theirs", lambda: theirs.step(), tensors.vary),
    ]
    timings = effort.time(cases, effort.repetitions(workload, slow=True))
    yield Row(
        "stable-spam on fused AdamW, whole step",
        timings.median("ours"),
        workload.name,
        "step of pytorch_optimizer's StableSPAM",
        timings.median("theirs"),
        0.20,
    )
