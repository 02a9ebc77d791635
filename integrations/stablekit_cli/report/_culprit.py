"""Which tensor, or which module, is behind what went wrong; nothing where none stands out."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stablekit import Event

__all__ = ["ALARMS", "culprit", "worst_tensor"]

ALARMS = ("spike", "nonfinite", "scaler-skip", "skip", "rollback")
"""Kinds of events that say something went wrong, in the order in which they are told."""


def culprit(events: Sequence[Event], tensors: int) -> list[str]:
    """Return sentences on who is behind what went wrong.

    Args:
        events: those of the run.
        tensors: how many tensors the run has.
    """
    return [*_everywhere(events, tensors), *_worst(events, tensors)]


def worst_tensor(events: Iterable[Event], tensors: int) -> tuple[str, int, int] | None:
    """Return the tensor most often named first, at how many steps, and of how many bad steps.

    Events that tell no tensor from the others are left out.
    """
    alarms = [event for event in events if event.kind in ALARMS and _is_telling(event, tensors)]
    named = {(event.step, event.tensors[0]) for event in alarms}
    if not named:
        return None
    times = Counter(name for _, name in sorted(named))
    ((name, most),) = times.most_common(1)
    return name, most, len({step for step, _ in named})


def _is_telling(event: Event, tensors: int) -> bool:
    """Tell whether the first tensor of an event stands out from the others."""
    if not event.tensors:
        return False
    if event.kind != "spike":
        return not _is_everywhere(event, tensors)
    scores = event.data.get("tensor_scores")
    if not scores:
        return True
    return math.isfinite(scores[0]) and (len(scores) == 1 or min(scores) < max(scores))


def _is_everywhere(event: Event, tensors: int) -> bool:
    return tensors > 1 and 2 * _affected(event) > tensors


def _affected(event: Event) -> int:
    """Return how many tensors an event is about; it may name only the first of them."""
    count = event.data.get("count")
    return max(len(event.tensors), count if isinstance(count, int) else 0)


def _everywhere(events: Iterable[Event], tensors: int) -> list[str]:
    events = list(events)
    most = max((_affected(one) for one in events if one.kind == "nonfinite"), default=0)
    parts = []
    if tensors > 1 and 2 * most > tensors:
        which = f"All {tensors:,}" if most >= tensors else f"{most:,} of {tensors:,}"
        parts.append(f"{which} tensors were not finite, so no single one is behind it")
    modules = [one.data.get("module") for one in events if one.kind == "nonfinite-activation"]
    if modules and modules[0]:
        parts.append(f"first non-finite output: {modules[0]}")
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}."] if text else []


def _worst(events: Iterable[Event], tensors: int) -> list[str]:
    worst = worst_tensor(events, tensors)
    if worst is None:
        return []
    name, times, bad_steps = worst
    if bad_steps == 1:
        return [f"The tensor behind it was {name}."]
    return [f"Worst tensor: {name}, named first at {times:,} of {bad_steps:,} bad steps."]
