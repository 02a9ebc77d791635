"""A lower panel of the chart: gradient norm and threshold of one arm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stablekit_cli.demo._palette import GREY, INJECTED, INK, folded, plain_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stablekit_cli.demo._palette import Style
    from stablekit_cli.demo._training import Plan, Run

__all__ = ["draw_norms", "key_handles", "norm_limits"]

SKIPPED, DIED = "v", "X"


def draw_norms(axes: Axes, run: Run, style: Style, plan: Plan, limits: tuple[float, float]) -> None:
    """Draw the gradient norm of every step, what it was clipped to, and what went wrong."""
    _curves(axes, run, style, thin=400 / plan.steps)
    axes.axvline(plan.injected_step, color=INJECTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_ylim(limits)
    axes.set_xlim(0, plan.steps)
    axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
    axes.set_xlabel("step", color=GREY, fontsize=9)
    plain_frame(axes)
    _title(axes, run, style)
    _mark(axes, run, style, plan, limits)


def _curves(axes: Axes, run: Run, style: Style, *, thin: float) -> None:
    steps = [record.step for record in run.records]
    norms = [record.reading.grad_norm for record in run.records]
    thresholds = [record.reading.threshold for record in run.records]
    axes.plot(steps, norms, color=style.color, linewidth=min(0.9, max(0.35, thin)))
    axes.plot(
        steps, [math.nan if one is None else one for one in thresholds], color=INK, linewidth=1.3
    )


def _title(axes: Axes, run: Run, style: Style) -> None:
    """Write label and figures above the panel; beside a long label the figures go below."""
    clipped = sum(record.reading.clipped > 0 for record in run.records)
    figures = f"clipped {clipped}, skipped {len(run.skipped_steps)}"
    fits = len(run.arm.label) <= 10
    axes.set_title(
        folded(run.arm.label, 30), color=style.color, fontsize=11 if fits else 8,
        fontweight="bold", loc="left",
    )  # fmt: skip
    if fits:
        axes.set_title(figures, color=GREY, fontsize=8, loc="right")
    else:
        axes.set_xlabel(f"step ({figures})", color=GREY, fontsize=9)


def norm_limits(runs: list[Run], plan: Plan) -> tuple[float, float]:
    """Return common limits: those of the arms that reached the injected step, with room above."""
    lived = [run for run in runs if run.died_at is None or run.died_at >= plan.injected_step]
    norms = sorted(
        record.reading.grad_norm
        for run in lived or runs
        for record in run.records
        if 0 < record.reading.grad_norm < math.inf
    )
    if not norms:
        return 0.1, 10.0
    return norms[len(norms) // 200] / 2, 20 * norms[-1]


def key_handles(runs: list[Run]) -> list[Line2D]:
    """Return the legend of the lower panels."""
    handles = [
        Line2D([], [], color=GREY, linewidth=0.9, label="gradient norm (log scale)"),
        Line2D([], [], color=INK, linewidth=1.3, label="threshold"),
        Line2D([], [], color=INJECTED, linestyle=(0, (4, 3)), label="injected NaN"),
    ]
    if any(run.skipped_steps for run in runs):
        handles.append(_symbol(SKIPPED, INK, "step skipped"))
    if any(run.died_at is not None for run in runs):
        handles.append(_symbol(DIED, GREY, "arm died"))
    return handles


def _symbol(
    marker: str, color: str, label: str = "", at: tuple[float, float] | None = None
) -> Line2D:
    x, y = ([], []) if at is None else ([at[0]], [at[1]])
    return Line2D(
        x, y, color=color, marker=marker, markersize=10, markeredgecolor="white",
        linestyle="none", label=label, zorder=5,
    )  # fmt: skip


def _mark(axes: Axes, run: Run, style: Style, plan: Plan, limits: tuple[float, float]) -> None:
    """Mark skipped steps and death at the upper edge, where no curve is."""
    top = limits[1] * 0.6
    for step in run.skipped_steps:
        axes.add_line(_symbol(SKIPPED, INK, at=(step, top)))
    if run.died_at is None:
        return
    axes.add_line(_symbol(DIED, style.color, at=(run.died_at, top)))
    right = run.died_at < plan.steps / 2
    axes.annotate(
        _obituary(run, top), (run.died_at, top), xytext=(9 if right else -9, 0),
        textcoords="offset points", ha="left" if right else "right", va="center", fontsize=8,
        color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _obituary(run: Run, top: float) -> str:
    """Return when the arm died and, where its norm left the panel, how far."""
    norms = [record.reading.grad_norm for record in run.records]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    text = f"died at step {run.died_at}"
    return f"{text}\nnorm up to {largest:.0e}" if largest > top else text
