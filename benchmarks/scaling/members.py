"""What each plugin asks of a step and adds to it; the numbers are counted, ``--check`` says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import stablekit
from benchmarks.scaling.small import NOTHING, ZERO, Linear, Small
from stablekit import hookimpl
from stablekit_monitors import SpikeMonitor

if TYPE_CHECKING:
    from stablekit import Step

HISTORY = 100
"""Past norms that the quantile plugins keep here; their sort is what they cost."""

_FAR = 1e9


@final
@dataclass(frozen=True)
class Member:
    """A plugin, as the model sees it.

    Args:
        spec: how to attach it, with limits that nothing reaches.
        asks: what it reads, in order: "norm" (the global one), "norms" (one a tensor), "units",
            "amaxes", "loss".
        acts: what it multiplies: "all" by one factor, each "tensor" or "unit" by its own; or each
            "element" is changed.
        skips: whether it may skip a step.
        small: its small operations.
        small_cut: what sharded parameters add to them.
        kept: bytes it keeps from step to step.
        letter: bytes that wait for the next host copy after each step.
        temporary: most bytes at once that it makes and drops.
        host_reads: values it reads in a step of host mode in which nothing is clipped.
    """

    spec: Any
    asks: tuple[str, ...] = ()
    acts: str = ""
    skips: bool = False
    small: Small = NOTHING
    small_cut: Small = NOTHING
    kept: Linear = ZERO
    letter: Linear = ZERO
    temporary: Linear = ZERO
    host_reads: int = 0

    def plugin(self) -> Any:  # noqa: ANN401 - any plugin
        """Return what ``attach`` takes."""
        return self.spec() if callable(self.spec) else self.spec


@final
class LossReader:
    """Asks for the loss of every step."""

    name = "loss-reader"

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record it."""
        if step.loss is not None:
            step.record("loss", step.loss)


@final
class MetricsReader:
    """Asks for all metrics whenever they are handed out."""

    name = "metrics-reader"

    @hookimpl
    def on_metrics(self) -> None:
        """Let them be read."""


def _quantile_clip(**arguments: Any) -> Any:  # noqa: ANN401 - the plugin's own arguments
    return stablekit.create("quantile-clip", history=HISTORY, **arguments)


_SORT_BYTES = 42 * HISTORY

MEMBERS = {
    "global-norm": Member(
        f"global-norm:max_norm={_FAR}",
        asks=("norm",),
        acts="all",
        small=Small(Linear(15), Linear(116)),
        kept=Linear(13),
        host_reads=2,
    ),
    "nonfinite-guard": Member(
        "nonfinite-guard",
        skips=True,
        small=Small(Linear(20), Linear(120, tensor=27)),
        kept=Linear(13),
        letter=Linear(9, tensor=1),
        host_reads=2,
    ),
    "zclip": Member(
        f"zclip:max_grad_norm={_FAR}",
        asks=("norm",),
        acts="all",
        small=Small(Linear(76), Linear(665)),
        kept=Linear(46),
        host_reads=2,
    ),
    "adagc": Member(
        f"adagc:lambda_abs={_FAR}",
        asks=("norms", "norm"),
        acts="tensor",
        small=Small(Linear(73), Linear(178, tensor=417)),
        kept=Linear(29, tensor=20),
        temporary=Linear(tensor=47),
        host_reads=2,
    ),
    "agc": Member(
        f"agc:clipping={_FAR}",
        asks=("units",),
        acts="unit",
        small=Small(Linear(34, tensor=1, matrix=2), Linear(41, tensor=76, vector=96, unit=200)),
        small_cut=Small(Linear(matrix=5), Linear(tensor=4, vector=32, unit=92)),
        kept=Linear(16, tensor=16),
        temporary=Linear(24, tensor=8, vector=36, unit=40),
        host_reads=2,
    ),
    "quantile-clip": Member(
        _quantile_clip,
        asks=("norm",),
        acts="all",
        small=Small(Linear(68), Linear(779 + _SORT_BYTES)),
        kept=Linear(28 + 4 * HISTORY),
        temporary=Linear(76 + 12 * HISTORY),
        host_reads=2,
    ),
    "quantile-clip(per_tensor)": Member(
        lambda: _quantile_clip(per_tensor=True, name="per-tensor"),
        asks=("norm", "norms"),
        acts="tensor",
        small=Small(Linear(70), Linear(69, tensor=760 + _SORT_BYTES)),
        kept=Linear(20, tensor=16 + 4 * HISTORY),
        temporary=Linear(tensor=8 + 12 * HISTORY),
        host_reads=2,
    ),
    "autoclip": Member(
        lambda: stablekit.create("autoclip", history=HISTORY),
        asks=("norm",),
        acts="all",
        small=Small(Linear(65), Linear(762 + _SORT_BYTES)),
        kept=Linear(21 + 4 * HISTORY),
        temporary=Linear(81 + 16 * HISTORY),
        host_reads=2,
    ),
    "clip-value": Member(
        lambda: stablekit.create("clip-value", limit=_FAR),
        asks=("amaxes",),
        acts="element",
        small=Small(Linear(7), Linear(37, tensor=14)),
        kept=Linear(8, tensor=8),
        host_reads=2,
    ),
    "spike-monitor": Member(
        SpikeMonitor,
        asks=("loss",),
        small=Small(Linear(191), Linear(2069)),
        kept=Linear(109),  # and 32 norms a tensor in the host's memory
        host_reads=4,
    ),
    "reads step.loss": Member(LossReader, asks=("loss",)),
    "reads metrics": Member(MetricsReader, asks=("metrics",)),
}
