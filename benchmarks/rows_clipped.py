"""Rows: a step in which the global norm is clipped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.nn.utils import clip_grad_norm_

import stablekit
from benchmarks.interleave import Case, Timings
from benchmarks.table import Row
from benchmarks.workloads import NORM, FusedAdamW, Tensors, Workload, free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    from benchmarks.effort import Effort

_LIMIT = NORM / 2
_PLUGINS = {
    "global-norm": f"global-norm:max_norm={_LIMIT}",
    "zclip": f"zclip:max_grad_norm={_LIMIT},warmup_steps=2",
}


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure clippers that halve the gradients in every step."""
    tensors = Tensors(workload, keep_source=True)
    for optimizer, make in (
        ("fused AdamW", FusedAdamW(tensors)),
        ("free step", partial(free, tensors)),
    ):
        timings = _measure(tensors, make, effort)
        for plugin in _PLUGINS:
            yield Row(
                f"{plugin}, added to {optimizer}, every step clipped",
                timings.added(plugin, "bare"),
                workload.name,
                "what clip_grad_norm_ adds",
                timings.added("clip_grad_norm_", "bare"),
            )


def _measure(tensors: Tensors, make: Callable[[], Optimizer], effort: Effort) -> Timings:
    bare, clipped = make(), make()
    attached = {name: stablekit.wrap(make(), given) for name, given in _PLUGINS.items()}

    def clip_and_step() -> None:
        clip_grad_norm_(tensors.params, _LIMIT)
        clipped.step()

    cases = [
        Case("bare", bare.step, tensors.restore),
        Case("clip_grad_norm_", clip_and_step, tensors.restore),
        *(Case(name, o.step, tensors.restore) for name, o in attached.items()),
    ]
    timings = effort.time(cases, effort.repetitions(tensors.workload, slow=True))
    for name, optimizer in attached.items():
        if stablekit.session(optimizer).metrics()[f"{name}/clipped"] != 1:
            raise RuntimeError(f"{name} should clip in these rows, but did not")
    return timings
