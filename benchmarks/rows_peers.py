"""Rows: packages from PyPI that do what a plugin does; for information."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoclip.torch import QuantileClip
from torch.nn import ParameterList
from zclip import ZClip

import stablekit
from benchmarks.interleave import Case
from benchmarks.naive import ListAutoClip
from benchmarks.table import Row
from benchmarks.workloads import Tensors, Workload, free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.effort import Effort


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure each pair on a step that is free and gradients that vary from step to step."""
    tensors = Tensors(workload, keep_source=True)
    bare = free(tensors)
    pairs = _pairs(tensors)
    cases = [Case("bare", bare.step, tensors.vary)]
    for plugin, (peer, theirs) in pairs.items():
        ours = stablekit.wrap(free(tensors), plugin)
        cases += [Case(plugin, ours.step, tensors.vary), Case(peer, theirs, tensors.vary)]
    timings = effort.time(cases, effort.repetitions(workload, slow=True))
    for plugin, (peer, _) in pairs.items():
        ours_added = timings.added(plugin, "bare")
        yield Row(plugin, ours_added, workload.name, peer, timings.median(peer))


def _pairs(tensors: Tensors) -> dict[str, tuple[str, Callable[[], object]]]:
    model = ParameterList(tensors.params)
    zclip = ZClip(warmup_steps=2)
    quantile = QuantileClip(tensors.params, global_threshold=True)
    published = ListAutoClip(tensors.params)
    return {
        "zclip:warmup_steps=2": ("zclip 1.0.0", lambda: zclip.step(model)),
        "quantile-clip": ("autoclip 0.2.1 QuantileClip", quantile.step),
        "autoclip": ("AutoClip as its authors publish it", published.step),
    }
