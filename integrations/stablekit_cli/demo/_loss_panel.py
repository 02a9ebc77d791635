"""The upper panel of the chart: training loss of every arm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from stablekit_cli.demo._palette import GREY, INJECTED, INK, folded, plain_frame
from stablekit_cli.demo._table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stablekit_cli.demo._palette import Style
    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = ["draw_losses"]


def draw_losses(axes: Axes, runs: list[Run], styles: list[Style], plan: Plan, facts: Facts) -> None:
    """Draw all arms: the median of a window or, where spikes are what matters, the worst."""
    window = max(1, plan.steps // 40)
    spikes = facts.high_loss is not None
    curves = [_rolling(_losses(run), window, worst=spikes) for run in runs]
    top = _top(runs, plan)
    for run, style, curve in zip(runs, styles, curves, strict=True):
        steps = range(1, len(curve) + 1)
        if not spikes:
            axes.plot(steps, _losses(run), color=style.color, linewidth=0.6, alpha=0.3)
        axes.plot(
            steps, curve, color=style.color, linestyle=style.dash, linewidth=1.8, label=_label(run)
        )
        _mark_death(axes, run, style, curve, top)
    finite = [value for curve in curves for value in curve if 0 < value < math.inf]
    axes.set_yscale("log")
    axes.set_ylim(0.7 * min(finite, default=1.0), top)
    axes.set_xlim(0, plan.steps)
    shown = f"{'worst' if spikes else 'median'} of {window} steps" if window > 1 else "each step"
    _describe(axes, plan, facts, shown)


def _describe(axes: Axes, plan: Plan, facts: Facts, shown: str) -> None:
    axes.axvline(plan.injected_step, color=INJECTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "injected NaN", (plan.injected_step, 1), xycoords=("data", "axes fraction"),
        xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9, color=INJECTED,
    )  # fmt: skip
    plain_frame(axes)
    low, high = axes.get_ylim()
    if high / low < 1e3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    faint = ", faint: each step" if facts.high_loss is None and shown != "each step" else ""
    axes.set_ylabel(f"training loss ({facts.unit})", color=INK)
    axes.set_xlabel(f"step; {shown}{faint}", color=GREY, fontsize=9)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), title="held-out loss before the NaN",
        frameon=False, fontsize=9, title_fontsize=9, alignment="left", labelcolor=INK,
    )  # fmt: skip


def _label(run: Run) -> str:
    ended = "finished" if run.died_at is None else f"died at step {run.died_at}"
    figures = f"{number(run.held_out_before)}, {ended}"
    label = folded(run.arm.label, 34)
    return f"{label}  {figures}" if len(label) <= 14 else f"{label}\n{figures}"


def _losses(run: Run) -> NDArray[np.float64]:
    return np.array([record.loss for record in run.records])


def _rolling(losses: NDArray[np.float64], window: int, *, worst: bool) -> NDArray[np.float64]:
    """Return the median, or the maximum, of the last ``window`` losses at every step."""
    reduce = np.max if worst else np.median
    return np.array([reduce(losses[max(0, i - window) : i]) for i in range(1, len(losses) + 1)])


def _top(runs: list[Run], plan: Plan) -> float:
    """Return a limit above every arm that reached the injected step; others may leave the panel."""
    lived = [run for run in runs if run.died_at is None or run.died_at >= plan.injected_step]
    losses = [record.loss for run in lived or runs for record in run.records]
    return 2 * max((loss for loss in losses if math.isfinite(loss)), default=1.0)


def _mark_death(axes: Axes, run: Run, style: Style, curve: NDArray[np.float64], top: float) -> None:
    """Mark the last loss; an arm that left the panel is marked, and named, at its upper edge."""
    if run.died_at is None:
        return
    finite = curve[np.isfinite(curve)]
    left = not len(finite) or finite[-1] > top
    height = 0.9 * top if left else float(finite[-1])
    axes.plot(
        run.died_at, height, marker="X", markersize=10, color=style.color, markeredgecolor="white",
        clip_on=False, zorder=5,
    )  # fmt: skip
    if left:
        axes.annotate(
            f"{run.arm.label} died", (run.died_at, height), xytext=(9, 0), va="center",
            textcoords="offset points", fontsize=9, color=style.color,
        )  # fmt: skip
