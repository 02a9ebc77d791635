"""Playing a recorded run to a chain of plugins, step by step, and taking down what it decides."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from stablekit import hookimpl
from stablekit.errors import StablekitError
from stablekit_cli.replay._still import attach_to_nothing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from stablekit import Event, Step
    from stablekit_cli.replay._chains import Chain
    from stablekit_monitors.run_log import RunLog

__all__ = ["Outcome", "play"]


@dataclass(frozen=True)
class Outcome:
    """What a chain did on a recorded run of T rows."""

    chain: Chain
    metrics: dict[str, NDArray[np.float64]]
    """By metric key, ``[T]``; NaN where it was not recorded."""
    skipped: NDArray[np.bool_]
    """``[T]``: whether it asked to skip the step."""
    events: list[Event]
    """What it reported, with the numbers of the recorded steps."""
    stopped: str
    """Why a plugin ended the run; empty where none did."""
    played: int
    """How many rows it saw."""
    seconds: float


def play(run: RunLog, chain: Chain, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Play a run.

    Args:
        run: what was recorded.
        chain: the plugins.
        on_step: told how many rows were played, now and then.
    """
    notes = _Notes(len(run))
    optimizer, session = attach_to_nothing(run.names, [*chain.specs, notes])
    losses, rates = _losses(run), _rates(run)
    started, stopped, row = time.perf_counter(), "", 0
    for row in range(len(run)):
        notes.row = row
        optimizer.show(run.norms[row], run.present[row], rates[row])
        if losses[row] is not None:
            session.observe(loss=losses[row])
        try:
            optimizer.step()
        except StablekitError as error:
            stopped = f"at step {run.steps[row]}: {error}"
            break
        if on_step is not None and row % 256 == 0:
            on_step(row)
    elapsed = time.perf_counter() - started
    events = [_renumbered(event, run) for event in notes.events]
    played = row if stopped else len(run)
    return Outcome(chain, notes.metrics, notes.skipped, events, stopped, played, elapsed)


@final
class _Notes:
    """Take down metrics, skips and events of every step; listed after the plugins of the chain."""

    name = "replay-notes"

    def __init__(self, rows: int) -> None:
        self.row = 0
        self.metrics: dict[str, NDArray[np.float64]] = {}
        self.skipped = np.zeros(rows, dtype=bool)
        self.events: list[Event] = []

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Copy what was recorded in this step."""
        for key, value in step.recorded.items():
            if key not in self.metrics:
                self.metrics[key] = np.full(len(self.skipped), math.nan)
            self.metrics[key][self.row] = float(value)
        self.skipped[self.row] = not step.ok

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Keep the event."""
        self.events.append(event)


def _losses(run: RunLog) -> list[float | None]:
    """Return the losses to observe: NaN where it was NaN, None where none was observed."""
    if "loss" not in run.scalars:
        return [None] * len(run)
    values: list[float] = run.scalars["loss"].tolist()
    return [value if seen else None for value, seen in zip(values, run.has_loss, strict=True)]


def _rates(run: RunLog) -> list[float]:
    rates = run.scalars.get("lr", np.zeros(len(run)))
    known: list[float] = np.nan_to_num(rates).tolist()
    return known


def _renumbered(event: Event, run: RunLog) -> Event:
    """Return the event with the number that its step had in the recorded run."""
    values: dict[str, Any] = event.as_dict()
    return type(event).from_dict({**values, "step": int(run.steps[event.step - 1])})
