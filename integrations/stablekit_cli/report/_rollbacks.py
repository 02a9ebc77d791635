"""Where a run went back to an earlier state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Event

__all__ = ["returns_in", "told"]


def returns_in(events: Iterable[Event]) -> list[tuple[int, int]]:
    """Return the (from, to) steps of all rollbacks that were carried out."""
    found = [event.data for event in events if event.kind == "rollback"]
    return [
        (int(data["from_step"]), int(data["to_step"]))
        for data in found
        if isinstance(data.get("from_step"), int) and isinstance(data.get("to_step"), int)
    ]


def told(returns: list[tuple[int, int]]) -> list[str]:
    """Say it in a sentence; nothing where there was none."""
    if not returns:
        return []
    start, end = returns[-1]
    times = "once," if len(returns) == 1 else f"{len(returns):,} times, the last time"
    return [f"The run went back {times} from step {start:,} to {end:,}."]
