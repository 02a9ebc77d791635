"""The demo's result as text: the table, how each arm ended, the comparison with plain clipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from stablekit_cli.demo._checks import (
    MARGIN,
    NO_BETTER,
    WORSE,
    against_clip,
    comparisons,
    failures,
    fate,
    worst_spike,
)
from stablekit_cli.demo._summary import settled_step, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = ["notes", "table"]


def table(runs: list[Run], plan: Plan, facts: Facts) -> Table:
    """Return one row per arm."""
    made = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{facts.name}, {plan.steps} steps, seed {plan.seed}; loss in {facts.unit}",
        caption=f"* injected: a NaN in the gradient of {facts.injected_tensor} at step "
        f"{plan.injected_step}, in every arm",
    )
    made.add_column("arm", overflow="fold", min_width=8)
    for heading in _headings(plan, facts):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("culprit tensors", overflow="fold", min_width=8)
    for run in runs:
        made.add_row(*_row(run, runs, plan, facts))
    return made


def notes(runs: list[Run], plan: Plan, facts: Facts) -> Iterator[Text]:
    """Yield the sentences below the table."""
    for run in runs:
        wrong = failures(run, plan, facts)
        yield Text(f"{run.arm.label}: {fate(run, plan, facts)}{worst_spike(run)}")
        for problem in wrong:
            yield Text(f"  CHECK FAILED: {problem}", style="bold red")
    lines = comparisons(runs, plan, facts)
    for line in lines:
        yield Text(line, style="yellow" if NO_BETTER in line or WORSE in line else "")
    if lines:
        yield Text(
            f"A difference below {MARGIN:.0%} counts as none. One seed each: repeat with other "
            "values of --seed before you believe an order."
        )


def _headings(plan: Plan, facts: Facts) -> Iterator[str]:
    yield from ("held-out\nbefore NaN", "it against\nclip", "held-out\nat end")
    yield f"worst loss\nafter {settled_step(plan, facts)}"
    if facts.high_loss is not None:
        yield f"losses\n> {facts.high_loss}"
    yield from ("steps\nclipped", "steps\nskipped", "spikes\nseen", "ms per\nstep")


def _row(run: Run, runs: list[Run], plan: Plan, facts: Facts) -> Iterator[str]:
    summary = summarize(run, plan, facts)
    dead = run.died_at is not None and run.died_at <= plan.injected_step
    partly = f"\n({summary.share_clipped:.0%} of\ntensors)" if 0 < summary.share_clipped < 1 else ""
    yield run.arm.label
    yield number(run.held_out_before)
    yield against_clip(run, runs)
    yield number(run.held_out_end)
    yield number(summary.worst_loss) + ("\nthen died" if dead else "")
    if summary.high_losses is not None:
        yield str(summary.high_losses)
    yield f"{summary.steps_clipped}{partly}"
    yield str(summary.steps_skipped)
    yield str(summary.spikes) if run.arm.protected else "-"
    yield f"{summary.milliseconds:.1f}"
    yield "\n".join(_culprit(name, facts) for name in summary.culprits) or "-"


def _culprit(name: str, facts: Facts) -> str:
    return f"{name}*" if name == facts.injected_tensor else name


def number(value: float) -> str:
    """Return a loss with three decimals, or in scientific notation where that is too long."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.1e}"
