"""What happened, in one or two sentences, and how bad it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stablekit_cli.report._culprit import ALARMS, culprit
from stablekit_cli.report._ending import ending
from stablekit_cli.report._rollbacks import returns_in, told
from stablekit_cli.report._text import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Event
    from stablekit_monitors.run_log import RunLog

__all__ = ["Verdict", "spikes_in", "verdict_on"]


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
    sentences += culprit(run.events, len(run.names))
    sentences += told(returns_in(run.events))
    lost, end = ending(run)
    level = "lost" if lost else "survived" if set(kinds) & set(ALARMS) or skipped else "calm"
    return Verdict(level, " ".join([*sentences, *end]))


def spikes_in(run: RunLog) -> int:
    """Return at how many steps there was a spike, in whatever signal."""
    return len({event.step for event in run.events if event.kind == "spike"})


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
