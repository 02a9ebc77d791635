"""The figures of one arm, computed from its records."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = ["Summary", "settled_step", "summarize"]


@dataclass(frozen=True)
class Summary:
    """A row of the table."""

    worst_loss: float
    """Highest finite training loss after the settling phase and up to the injected step."""
    high_losses: int | None
    """Number of such losses above ``Facts.high_loss``."""
    steps_clipped: int
    share_clipped: float
    """Mean fraction of the tensors clipped, over the steps that clipped any."""
    steps_skipped: int
    spikes: int
    """Number of steps at which the spike monitor reported one."""
    culprits: tuple[str, ...]
    """Tensors behind skipped steps and gradients that are not finite."""
    milliseconds: float
    """Median time of a step."""


def settled_step(plan: Plan, facts: Facts) -> int:
    """Return the step after which a high loss counts as damage."""
    return round(plan.steps * facts.settled)


def summarize(run: Run, plan: Plan, facts: Facts) -> Summary:
    """Return the figures of one arm.

    The losses end at the injected step: what the NaN does to an arm is told by its fate.
    """
    window = range(settled_step(plan, facts) + 1, plan.injected_step + 1)
    losses = [record.loss for record in run.records if record.step in window]
    clipped = [record.reading.clipped for record in run.records if record.reading.clipped > 0]
    names = (
        name
        for _, incident in run.incidents
        if incident.kind in {"nonfinite", "skip"}
        for name in incident.tensors
    )
    high = facts.high_loss
    return Summary(
        worst_loss=max((one for one in losses if math.isfinite(one)), default=math.nan),
        high_losses=None if high is None else sum(not loss <= high for loss in losses),
        steps_clipped=len(clipped),
        share_clipped=statistics.fmean(clipped) if clipped else 0.0,
        steps_skipped=len(run.skipped_steps),
        spikes=len({step for step, incident in run.incidents if incident.kind == "spike"}),
        culprits=tuple(dict.fromkeys(names)),
        milliseconds=statistics.median([r.milliseconds for r in run.records] or [math.nan]),
    )
