"""Which steps of a recorded run are known to be bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import stablekit
from stablekit_cli.replay._chains import Chain
from stablekit_cli.replay._play import play

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Event
    from stablekit_monitors.run_log import RunLog

__all__ = ["MONITOR", "Spikes", "not_finite", "spikes_of"]

MONITOR = "spike-monitor"
KINDS = ("spike", "nonfinite")


@dataclass(frozen=True)
class Spikes:
    """Numbers of steps, and who says so."""

    steps: tuple[int, ...]
    source: str


def spikes_of(run: RunLog, named: Iterable[int] = ()) -> Spikes:
    """Return the steps that the user names, or those reported when the run was recorded.

    Where no spike monitor was attached then, it is replayed now.
    """
    if steps := tuple(sorted(set(named))):
        return Spikes(steps, "named on the command line")
    if MONITOR in (run.header.get("plugins") or {}) or _steps(run.events, "spike"):
        return Spikes(_steps(run.events, *KINDS), "events of the recorded run")
    if MONITOR not in stablekit.available():
        return Spikes(_steps(run.events, *KINDS), "events of the recorded run")
    events = play(run, Chain(MONITOR, (MONITOR,))).events
    return Spikes(_steps(events, *KINDS), f"{MONITOR}, replayed")


def not_finite(run: RunLog, steps: Iterable[int]) -> tuple[int, ...]:
    """Return those of the steps whose gradients are not finite."""
    bad = {int(step) for step in run.steps[~np.isfinite(run.norms).all(axis=1)]}
    return tuple(step for step in steps if step in bad)


def _steps(events: Iterable[Event], *kinds: str) -> tuple[int, ...]:
    return tuple(sorted({event.step for event in events if event.kind in kinds}))
