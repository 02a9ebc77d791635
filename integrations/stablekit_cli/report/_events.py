"""The table of events: every kind can be shown or hidden, every culprit has its name."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stablekit_cli.report._text import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablekit import Event

__all__ = ["Row", "kinds_of", "marks_of", "rows_of"]

ROWS = 1000
MARKS = 4000
SHOWN = 3


@dataclass(frozen=True)
class Row:
    """One event as text."""

    step: int
    kind: str
    plugin: str
    message: str
    tensors: tuple[str, ...]
    """The first culprits."""
    others: tuple[str, ...]
    """The rest of them."""
    data: str


def rows_of(events: Sequence[Event]) -> list[Row]:
    """Return the rows: of too many events the first and the last of each kind."""
    return [_row(event) for event in _thinned(events, ROWS)]


def kinds_of(events: Sequence[Event]) -> list[tuple[str, int]]:
    """Return the kinds with their counts, the most frequent first."""
    return Counter(event.kind for event in events).most_common()


def marks_of(events: Sequence[Event]) -> list[tuple[int, str]]:
    """Return the distinct (step, kind) to be marked in the charts."""
    return sorted({(event.step, event.kind) for event in _thinned(events, MARKS)})


def _thinned(events: Sequence[Event], limit: int) -> list[Event]:
    if len(events) <= limit:
        return list(events)
    kinds = Counter(event.kind for event in events)
    each = max(2, limit // len(kinds)) // 2
    seen: Counter[str] = Counter()
    kept = []
    for event in events:
        seen[event.kind] += 1
        if seen[event.kind] <= each or seen[event.kind] > kinds[event.kind] - each:
            kept.append(event)
    return kept[:limit]


def _row(event: Event) -> Row:
    names = event.tensors
    data = "  ".join(f"{key}={_plain(value)}" for key, value in event.data.items())
    return Row(
        event.step, event.kind, event.plugin, event.message, names[:SHOWN], names[SHOWN:], data
    )


def _plain(value: Any) -> str:  # noqa: ANN401 - whatever a plugin put into its event
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value.is_integer() else number(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value[:4])) + (", ..." if len(value) > 4 else "") + "]"
    return str(value)
