"""Rows: AutoClip after a million steps against AutoClip after a thousand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

import stablekit
from benchmarks.interleave import Case
from benchmarks.naive import ListAutoClip
from benchmarks.table import Row
from benchmarks.workloads import Free
from stablekit_clipping import AutoClip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.effort import Effort

_SHORT, _LONG = 1_000, 1_000_000
_BLOCK = 50


def rows(effort: Effort) -> Iterator[Row]:
    """Measure steps of one parameter of one element: history is all that differs.

    Blocks of steps are timed, since the cost of a step is an amortised one.
    """
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(_LONG, generator=generator).mul(0.3).exp()
    stream = torch.randn(_BLOCK * (effort.blocks + 5), generator=generator).mul(0.3).exp()
    cases = [
        Case("ours, short", _ours(past[:_SHORT], stream)),
        Case("ours, long", _ours(past, stream)),
    ]
    timings = effort.time(cases, effort.blocks)
    yield Row(
        "autoclip, a step after 1,000,000 steps",
        timings.median("ours, long") / _BLOCK,
        "one element",
        "after 1,000 steps",
        timings.median("ours, short") / _BLOCK,
        1.5,
    )
    yield _published(past, stream, timings.median("ours, long") / _BLOCK, effort)


def _ours(past: Tensor, stream: Tensor) -> Callable[[], None]:
    param = Parameter(torch.zeros(1))
    plugin = AutoClip(10.0)
    plugin.load_state_dict({"history": past})
    optimizer = stablekit.wrap(Free([param]), plugin)
    return _stepper(param, stream, _BLOCK, optimizer.step)


def _published(past: Tensor, stream: Tensor, ours: float, effort: Effort) -> Row:
    param = Parameter(torch.zeros(1))
    published = ListAutoClip([param])
    published.history = past.tolist()
    case = Case("theirs", _stepper(param, stream, 1, published.step))
    timings = effort.time([case], 3, warmup=1)
    return Row(
        "autoclip, a step after 1,000,000 steps",
        ours,
        "one element",
        "its authors' code (numpy over a list)",
        timings.median("theirs"),
    )


def _stepper(
    param: Parameter, stream: Tensor, block: int, step: Callable[[], None]
) -> Callable[[], None]:
    gradients = iter(stream.view(-1, 1).clone().unbind())

    def run() -> None:
        for _ in range(block):
            param.grad = next(gradients)
            step()

    return run
