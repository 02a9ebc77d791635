"""What happened, in one or two sentences, and how bad it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stablekit_cli.report._text import counted, listed, number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Event
    from stablekit_monitors.run_log import RunLog

__all__ = ["ALARMS", "Verdict", "spikes_in", "verdict_on", "worst_tensor"]

ALARMS = ("spike", "nonfinite", "scaler-skip", "skip", "rollback")
"""Kinds of events that say something went wrong, in the order in which they are told."""


@dataclass(frozen=True)
class Verdict:
    """The top of the page."""

    level: str
    """ "calm", "survived" or "lost"."""
    text: str


def verdict_on(run: RunLog) -> Verdict:
    """Judge a run by its events and by the loss and the norm at its end."""
    if not len(run):
        return Verdict("calm", "Nothing is recorded in this run yet.")
    kinds = Counter(event.kind for event in run.events)
    skipped = int((~run.ok).sum())
    what = [
        counted(spikes_in(run), "spike"),
        counted(skipped, "step skipped", "steps skipped"),
        *_rollbacks(kinds["rollback"]),
    ]
    sentences = [f"{listed(what)} in {counted(_steps(run), 'step')}.".capitalize()]
    sentences += _nonfinite(run.events)
    sentences += _culprit(run.events)
    lost = _end(run)
    level = "lost" if lost else "survived" if set(kinds) & set(ALARMS) or skipped else "calm"
    return Verdict(level, " ".join([*sentences, lost or _loss(run)]).strip())


def spikes_in(run: RunLog) -> int:
    """Return at how many steps there was a spike, in whatever signal."""
    return len({event.step for event in run.events if event.kind == "spike"})


def worst_tensor(events: Iterable[Event]) -> tuple[str, int, int] | None:
    """Return the tensor most often named first, at how many steps, and of how many bad steps."""
    alarms = [event for event in events if event.kind in ALARMS and event.tensors]
    named = {(event.step, event.tensors[0]) for event in alarms}
    if not named:
        return None
    times = Counter(name for _, name in sorted(named))
    ((name, most),) = times.most_common(1)
    return name, most, len({step for step, _ in named})


def _steps(run: RunLog) -> int:
    return int(run.stride.sum())


def _rollbacks(count: int) -> list[str]:
    return [counted(count, "rollback")] if count else []


def _nonfinite(events: Iterable[Event]) -> list[str]:
    steps = sorted({event.step for event in events if event.kind == "nonfinite"})
    if not steps:
        return []
    where = f"at step {steps[0]:,}" if len(steps) == 1 else f"at {len(steps):,} steps"
    first = "" if len(steps) == 1 else f", first at step {steps[0]:,}"
    return [f"The gradients were not finite {where}{first}."]


def _culprit(events: Iterable[Event]) -> list[str]:
    worst = worst_tensor(events)
    if worst is None:
        return []
    name, times, bad_steps = worst
    if bad_steps == 1:
        return [f"The tensor behind it was {name}."]
    return [f"Worst tensor: {name}, named first at {times:,} of {bad_steps:,} bad steps."]


def _end(run: RunLog) -> str:
    """Say so where the run is lost: its last recorded norm is not finite and was not skipped."""
    norms = run.scalars.get("grad_norm", np.empty(0))
    if not norms.size or np.isfinite(norms[-1]) or not run.ok[-1]:
        return ""
    if not len(run.norms) or np.isfinite(run.norms[-1]).all():
        return ""
    return f"The run ended with a gradient norm of {norms[-1]:g}."


def _loss(run: RunLog) -> str:
    losses = run.scalars.get("loss", np.empty(0))
    finite = losses[np.isfinite(losses)]
    if len(finite) < 2:
        return ""
    window = max(1, len(finite) // 50)
    start, end = float(np.median(finite[:window])), float(np.median(finite[-window:]))
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return f"The loss {verb} from {number(start)} to {number(end)}."
