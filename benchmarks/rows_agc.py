"""Rows: adaptive gradient clipping against the same written as timm does it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import stablekit
from benchmarks.interleave import Case
from benchmarks.naive import unit_wise_clip_
from benchmarks.table import Row
from benchmarks.workloads import Tensors, Workload, free

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.effort import Effort

# What is clipped, the ratio of norms that makes it so, and the target.
_SETTINGS = (("nothing", 1e3, 0, 0.30), ("everything", 1e-6, 1, 0.40))


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure AGC on a step that is free, with nothing and with everything clipped."""
    tensors = Tensors(workload, keep_source=True)
    for what, clipping, share, target in _SETTINGS:
        bare, wrapped = free(tensors), stablekit.wrap(free(tensors), f"agc:clipping={clipping}")
        timm = partial(unit_wise_clip_, tensors.params, clipping)
        cases = [
            Case("bare", bare.step),
            Case("agc", wrapped.step, tensors.restore),
            Case("timm", timm, tensors.restore),
        ]
        timings = effort.time(cases, effort.repetitions(workload, slow=True))
        if stablekit.session(wrapped).metrics()["agc/clipped"] != share:
            raise RuntimeError(f"agc should clip {what} in this row, but did not")
        yield Row(
            f"agc, {what} clipped",
            timings.added("agc", "bare"),
            workload.name,
            "timm's way",
            timings.median("timm"),
            target,
        )
