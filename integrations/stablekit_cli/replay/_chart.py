"""The chart of a replay: the recorded norm with every threshold, and below it who clipped when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from stablekit_cli.demo._palette import GREY, INK, folded, plain_frame
from stablekit_cli.replay._score import factors_of, thresholds_of
from stablekit_cli.replay._spikes import not_finite
from stablekit_cli.report._curves import kept_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stablekit_cli.replay._play import Outcome
    from stablekit_cli.replay._spikes import Spikes
    from stablekit_monitors.run_log import RunLog

__all__ = ["draw"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#882255", "#E69F00", "#56B4E9")
SPIKE = "#CC79A7"
NOT_FINITE = "#333333"
COLUMNS = 900
SMALLEST = 1e-2


def draw(path: Path, name: str, run: RunLog, outcomes: Sequence[Outcome], spikes: Spikes) -> None:
    """Write the chart as PNG."""
    strips = 0.32 * len(outcomes) + 0.1
    figure = Figure(figsize=(12, 5.4 + strips), facecolor="white", layout="constrained")
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3.6, strips], "hspace": 0.02}
    )
    _norms(upper, run, outcomes, spikes)
    _strips(lower, figure, run, outcomes)
    upper.set_title(f"{name}, replayed", color=INK, fontsize=12, loc="left")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=110)


def _norms(axes: Axes, run: RunLog, outcomes: Sequence[Outcome], spikes: Spikes) -> None:
    marked = np.searchsorted(run.steps, [*spikes.steps])
    norms = run.scalars.get("grad_norm", np.full(len(run), np.nan))
    rows = kept_rows([norms], marked)
    axes.plot(run.steps[rows], norms[rows], color="#AAAAAA", linewidth=0.7, label="recorded norm")
    for place, outcome in enumerate(outcomes):
        axes.plot(
            run.steps[rows], thresholds_of(outcome)[rows], color=COLORS[place % len(COLORS)],
            linewidth=1.4, label=folded(outcome.chain.label, 50),
        )  # fmt: skip
    lost = not_finite(run, spikes.steps)
    _lines(axes, [step for step in spikes.steps if step not in lost], SPIKE, "spike")
    _lines(axes, lost, NOT_FINITE, "not finite")
    if np.nanmax(np.where(np.isfinite(norms), norms, 0), initial=0) > 0:
        axes.set_yscale("log")
    plain_frame(axes)
    axes.set_ylabel("gradient norm and thresholds", color=INK)


def _lines(axes: Axes, steps: Sequence[int], color: str, label: str) -> None:
    for number, step in enumerate(steps[:200]):
        axes.axvline(
            step, color=color, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0,
            label=label if number == 0 else None,
        )  # fmt: skip


def _strips(axes: Axes, figure: Figure, run: RunLog, outcomes: Sequence[Outcome]) -> None:
    """Draw one strip a chain: the smallest factor of each stretch of steps."""
    edges, table = _table(run, [factors_of(outcome) for outcome in outcomes])
    shown = axes.pcolormesh(
        edges, np.arange(len(outcomes) + 1), np.log10(table.clip(SMALLEST)), cmap="Reds_r",
        vmin=np.log10(SMALLEST), vmax=0,
    )  # fmt: skip
    axes.set_yticks(np.arange(len(outcomes)) + 0.5, [_short(one) for one in outcomes])
    axes.invert_yaxis()
    axes.hlines(np.arange(1, len(outcomes)), edges[0], edges[-1], color="white", linewidth=2)
    axes.tick_params(colors=GREY, labelsize=8, length=0)
    axes.set_xlabel("step", color=GREY, fontsize=9)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=axes, aspect=4, pad=0.01, ticks=[-2, -1, 0])
    bar.ax.set_yticklabels(["< 0.01", "0.1", "1"], fontsize=8, color=GREY)
    bar.outline.set_visible(False)
    bar.set_label("factor", color=GREY, fontsize=8)


def _table(
    run: RunLog, factors: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cuts = np.unique(np.linspace(0, len(run), min(COLUMNS, len(run)) + 1).astype(int))
    edges = np.append(run.steps[cuts[:-1]] - 0.5, run.steps[-1] + 0.5)
    return edges, np.stack([np.minimum.reduceat(values, cuts[:-1]) for values in factors])


def _short(outcome: Outcome) -> str:
    label = outcome.chain.label
    return label if len(label) <= 28 else f"{label[:25]}..."
