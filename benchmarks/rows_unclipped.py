"""Rows: what plugins add to a step in which nothing is clipped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.nn.utils import clip_grad_norm_

import stablekit
from benchmarks.interleave import Case, Timings
from benchmarks.naive import accurate_norm
from benchmarks.table import Row
from benchmarks.workloads import FusedAdamW, Tensors, Workload, free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    from benchmarks.effort import Effort
    from stablekit import Session

# A short warm-up, so that what is timed is the steady state; the rounds before timing complete it.
_ZCLIP = "zclip:warmup_steps=2"
_CHAIN = ["nonfinite-guard", _ZCLIP, "adagc:warmup_steps=2", "spike-monitor"]
_TARGETS = {"gpt2": {"zclip": 0.60, "chain": 0.75}, "tiny": {"zclip": 0.80, "chain": 1.50}}


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure zclip alone and the recommended chain, on fused AdamW and on a step that is free."""
    tensors = Tensors(workload)
    for optimizer, make in (
        ("fused AdamW", FusedAdamW(tensors)),
        ("free step", partial(free, tensors)),
    ):
        timings = _measure(tensors, make, effort)
        yield from _rows(timings, workload, optimizer)


def chain() -> list[str]:
    """Return the plugins of the chain that are installed."""
    known = stablekit.available()
    return [plugin for plugin in _CHAIN if plugin.partition(":")[0] in known]


def _measure(tensors: Tensors, make: Callable[[], Optimizer], effort: Effort) -> Timings:
    bare, clipped, with_zclip, with_chain = make(), make(), make(), make()
    sessions = [
        stablekit.attach(with_zclip, _ZCLIP),
        stablekit.attach(with_chain, *chain()),
    ]

    def clip_and_step() -> None:
        clip_grad_norm_(tensors.params, 1.0)
        clipped.step()

    cases = [
        Case("bare", bare.step),
        Case("clip_grad_norm_", clip_and_step),
        Case("zclip", with_zclip.step),
        Case("chain", with_chain.step),
        Case("floor", lambda: accurate_norm(tensors.grads)),
    ]
    timings = effort.time(cases, effort.repetitions(tensors.workload))
    for session in sessions:
        _check_unclipped(session)
    return timings


def _rows(timings: Timings, workload: Workload, optimizer: str) -> Iterator[Row]:
    clip = timings.added("clip_grad_norm_", "bare")
    # Targets are about the real optimizer; the free step shows the same without its noise.
    targets = _TARGETS[workload.name] if optimizer == "fused AdamW" else {}
    names = {"zclip": "zclip", "chain": " + ".join(p.partition(":")[0] for p in chain())}
    for case, what in names.items():
        yield Row(
            f"{what}, added to {optimizer}, nothing clipped",
            timings.added(case, "bare"),
            workload.name,
            "what clip_grad_norm_ adds",
            clip,
            targets.get(case),
        )
    yield Row(
        f"zclip, added to {optimizer}, nothing clipped",
        timings.added("zclip", "bare"),
        workload.name,
        "floor (accurate norm alone)",
        timings.median("floor"),
        1.25 if targets and workload.name == "gpt2" else None,
    )


def _check_unclipped(session: Session) -> None:
    metrics = session.metrics()
    clipping = [name for name, value in metrics.items() if name.endswith("/clipped") and value]
    if clipping:
        raise RuntimeError(f"nothing should be clipped in these rows, but {clipping} is not 0")
