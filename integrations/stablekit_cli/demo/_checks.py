"""What the demo demands of protected arms, and what it says about all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stablekit_cli.demo._arms import CLIP
from stablekit_cli.demo._summary import summarize

if TYPE_CHECKING:
    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = [
    "MARGIN",
    "NO_BETTER",
    "WORSE",
    "against_clip",
    "comparisons",
    "failures",
    "fate",
    "worst_spike",
]

MARGIN = 0.01
"""Relative difference between two losses below which the demo calls neither better."""
NO_BETTER = "NO BETTER"
WORSE = "WORSE"


def failures(run: Run, plan: Plan, facts: Facts) -> list[str]:
    """Return what a protected arm did wrong; always empty for an unprotected one."""
    if not run.arm.protected:
        return []
    found = []
    if run.died_at is not None:
        found.append(f"died at step {run.died_at}: {run.cause}")
    elif not math.isfinite(run.held_out_end):
        found.append(f"finished with a held-out loss of {run.held_out_end}")
    if run.skipped_steps != [plan.injected_step]:
        found.append(
            f"skipped steps {run.skipped_steps or 'none'}, expected exactly the injected NaN at "
            f"step {plan.injected_step}"
        )
    named = {
        name
        for step, incident in run.incidents
        if step == plan.injected_step and incident.kind == "nonfinite"
        for name in incident.tensors
    }
    if facts.injected_tensor not in named:
        found.append(f"no event names the injected tensor {facts.injected_tensor}")
    return found


def fate(run: Run, plan: Plan, facts: Facts) -> str:
    """Return one sentence about how the arm ended, as it happened."""
    injected = f"the injected NaN (step {plan.injected_step}, {facts.injected_tensor})"
    diverged = (
        f"diverged (held-out loss {run.held_out_before:.4g}, untrained {run.held_out_start:.4g}); "
        if run.diverged
        else ""
    )
    if run.died_at is None:
        what = "skipped" if plan.injected_step in run.skipped_steps else "did not skip"
        return f"{diverged}finished; {what} {injected}"
    if run.died_at < plan.injected_step:
        return f"died at step {run.died_at}, before {injected}: {run.cause}"
    after = run.died_at - plan.injected_step
    end = f"died at step {run.died_at}, {after} step{'s' * (after != 1)} after {injected}"
    return f"{diverged}{end}: {run.cause}"


def worst_spike(run: Run) -> str:
    """Return the highest of the spikes that the monitor reported, as the end of a sentence."""
    seen = [(one.data["score"], step, one) for step, one in run.incidents if one.kind == "spike"]
    if not seen:
        return ""
    _, step, worst = max(seen, key=lambda one: one[:2])
    value, usual = worst.data["value"], worst.data["baseline"]
    what = f"{worst.data['signal']} {value:.3g}, usually {usual:.3g}"
    names = f", most of all {worst.tensors[0]}" if worst.tensors else ""
    return f"; worst spike at step {step}: {what}{names}"


def comparisons(runs: list[Run], plan: Plan, facts: Facts) -> list[str]:
    """Compare every stablekit arm with torch's clipping, before the injected NaN."""
    plain = _plain_clipping(runs)
    if plain is None:
        return []
    return [_compare(run, plain, plan, facts) for run in runs if run.arm.protected]


def against_clip(run: Run, runs: list[Run]) -> str:
    """Return how the held-out loss before the injected NaN compares with plain clipping."""
    plain = _plain_clipping(runs)
    if plain is None or not run.arm.protected:
        return "-"
    return _verdict(run.held_out_before, plain.held_out_before)


def _plain_clipping(runs: list[Run]) -> Run | None:
    return next((run for run in runs if run.arm.label == CLIP), None)


def _compare(run: Run, plain: Run, plan: Plan, facts: Facts) -> str:
    mine, other = summarize(run, plan, facts), summarize(plain, plan, facts)
    parts = [
        "held-out loss before the injected NaN "
        + _figures(run.held_out_before, plain.held_out_before),
        "worst training loss " + _figures(mine.worst_loss, other.worst_loss),
    ]
    if mine.high_losses is not None:
        parts.append(f"losses above {facts.high_loss}: {mine.high_losses}, {other.high_losses}")
    return f"{run.arm.label} against clip: {'; '.join(parts)}"


def _figures(ours: float, theirs: float) -> str:
    return f"{ours:.4g} against {theirs:.4g}, {_verdict(ours, theirs)}"


def _verdict(ours: float, theirs: float) -> str:
    """Return which is better; a difference below the margin counts as none."""
    if not math.isfinite(ours):
        return NO_BETTER
    if not math.isfinite(theirs) or ours < theirs * (1 - MARGIN):
        return "better"
    return WORSE if ours > theirs * (1 + MARGIN) else NO_BETTER
