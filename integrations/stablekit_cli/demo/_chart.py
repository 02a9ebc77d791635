"""The chart: the training loss of all arms in one panel, the gradient norm of each arm below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from stablekit_cli.demo._loss_panel import draw_losses
from stablekit_cli.demo._norm_panel import draw_norms, key_handles, norm_limits
from stablekit_cli.demo._palette import GREY, INJECTED, INK, styles_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.gridspec import GridSpec

    from stablekit_cli.demo._palette import Style
    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = ["draw"]

COLUMNS = 5
# Heights in inches: heading, loss panel, space below it, a row of norm panels, legend.
TOP, LOSS, GAP, NORMS, BOTTOM = 1.0, 3.7, 0.95, 2.6, 0.85
# Fractions of the width: left edge, where the legend of the loss panel begins, right edge.
LEFT, LEGEND, RIGHT = 0.06, 0.755, 0.985


def draw(path: Path, runs: list[Run], plan: Plan, facts: Facts) -> None:
    """Write the chart as PNG."""
    rows = math.ceil(len(runs) / COLUMNS)
    figure = Figure(figsize=(13, TOP + LOSS + GAP + NORMS * rows + BOTTOM), facecolor="white")
    upper, lower = _grids(figure, rows, min(COLUMNS, len(runs)))
    styles = styles_of([run.arm for run in runs])
    _texts(figure, plan, facts)
    draw_losses(figure.add_subplot(upper[0]), runs, styles, plan, facts)
    _norms(figure, lower, runs, styles, plan)
    figure.legend(
        handles=key_handles(runs), loc="lower center", ncols=6, frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def _grids(figure: Figure, rows: int, columns: int) -> tuple[GridSpec, GridSpec]:
    height = figure.get_figheight()
    floor = 1 - (TOP + LOSS) / height
    upper = figure.add_gridspec(1, 1, left=LEFT, right=LEGEND, top=1 - TOP / height, bottom=floor)
    lower = figure.add_gridspec(
        rows, columns, left=LEFT, right=RIGHT, top=floor - GAP / height, bottom=BOTTOM / height,
        hspace=0.5, wspace=0.08,
    )  # fmt: skip
    return upper, lower


def _norms(
    figure: Figure, grid: GridSpec, runs: list[Run], styles: list[Style], plan: Plan
) -> None:
    limits = norm_limits(runs, plan)
    for index, (run, style) in enumerate(zip(runs, styles, strict=True)):
        row, column = divmod(index, COLUMNS)
        axes = figure.add_subplot(grid[row, column])
        draw_norms(axes, run, style, plan, limits)
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("gradient norm", color=INK)


def _texts(figure: Figure, plan: Plan, facts: Facts) -> None:
    height = figure.get_figheight()
    title = f"stablekit demo: {facts.name}, {plan.steps} steps, seed {plan.seed}"
    injected = (
        f"One NaN injected into the gradient\nof {facts.injected_tensor}\n"
        f"at step {plan.injected_step}, in every arm"
    )
    figure.text(
        LEFT, 1 - 0.3 / height, title, fontsize=14, fontweight="bold", color=INK, va="center"
    )
    figure.text(LEFT, 1 - 0.57 / height, facts.title, fontsize=9, color=GREY, va="center")
    figure.text(
        RIGHT, 1 - (TOP + LOSS) / height, injected, fontsize=9, color=INJECTED, ha="right"
    )  # fmt: skip
