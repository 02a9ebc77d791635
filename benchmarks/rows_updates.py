"""Rows: plugins around the update against optimizers or loops that do the same; for information."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pytorch_optimizer import SPAM, StableAdamW

import stablekit
from benchmarks.interleave import Case
from benchmarks.table import Row
from benchmarks.workloads import FusedAdamW, Tensors, Workload, free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.nn import Parameter

    from benchmarks.effort import Effort


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure whole steps of optimizers, and what projections add to a step that is free."""
    yield from _optimizers(workload, effort)
    yield from _projections(workload, effort)


def _optimizers(workload: Workload, effort: Effort) -> Iterator[Row]:
    tensors = Tensors(workload, keep_source=True)
    stable, spam = StableAdamW(tensors.params, lr=1e-6), SPAM(tensors.params, lr=1e-6)
    pairs: dict[str, tuple[str, Callable[[], object]]] = {
        "update-clip": ("step of pytorch_optimizer's StableAdamW", stable.step),
        "spam": ("step of pytorch_optimizer's SPAM", spam.step),
    }
    make = FusedAdamW(tensors)
    cases = []
    for plugin, (peer, theirs) in pairs.items():
        ours = stablekit.wrap(make(), plugin)
        cases += [Case(plugin, ours.step, tensors.vary), Case(peer, theirs, tensors.vary)]
    timings = effort.time(cases, effort.repetitions(workload, slow=True))
    for plugin, (peer, _) in pairs.items():
        what = f"{plugin} on fused AdamW, whole step"
        yield Row(what, timings.median(plugin), workload.name, peer, timings.median(peer))


def _projections(workload: Workload, effort: Effort) -> Iterator[Row]:
    tensors = Tensors(workload)
    bare = free(tensors)
    matrices = [param for param in tensors.params if param.ndim > 1]
    pairs: dict[str, tuple[str, Callable[[], object]]] = {
        "weight-clip:limit=10": ("a loop of clamp_", lambda: _clamp(matrices)),
        "max-norm:max_norm=1000": ("a loop of torch.renorm", lambda: _renorm(matrices)),
    }
    cases = [Case("bare", bare.step)]
    for plugin, (peer, theirs) in pairs.items():
        cases += [Case(plugin, stablekit.wrap(free(tensors), plugin).step), Case(peer, theirs)]
    timings = effort.time(cases, effort.repetitions(workload, slow=True))
    for plugin, (peer, _) in pairs.items():
        what = f"{plugin}, nothing outside, norms included"
        yield Row(what, timings.added(plugin, "bare"), workload.name, peer, timings.median(peer))


@torch.no_grad()
def _clamp(params: list[Parameter]) -> None:
    for param in params:
        param.clamp_(-10.0, 10.0)


@torch.no_grad()
def _renorm(params: list[Parameter]) -> None:
    for param in params:
        param.copy_(torch.renorm(param, 2, 0, 1000.0))
