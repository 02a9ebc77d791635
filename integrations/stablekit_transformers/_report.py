"""What a session has to say, in Trainer's logs."""

from __future__ import annotations

import logging
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Event, Session

_LOGGER = logging.getLogger("stablekit_transformers")
_LINES = 20
_NAMED = 3


def merge_metrics(logs: dict[str, Any], session: Session) -> None:
    """Add the session's metrics to those of Trainer, which stay what they are.

    ``step_loss`` is the loss of the last step alone; Trainer's ``loss`` is a mean from which NaN
    and Inf are left out (``logging_nan_inf_filter``).
    """
    for name, value in session.metrics().items():
        logs.setdefault("step_loss" if name == "loss" else name, value)


@final
class Reporter:
    """Writes new events to the log, one line a step, until there were too many."""

    def __init__(self) -> None:
        """Begin with no event told."""
        self._last: Event | None = None
        self._lines = 0

    def begin(self, session: Session) -> None:
        """Take the events so far, perhaps of a checkpoint, as told."""
        self._last = next(reversed(session.events), None)

    def tell(self, session: Session) -> None:
        """Write what was emitted since the last call."""
        events = session.events
        if not events or events[-1] is self._last:
            return
        fresh = list(takewhile(lambda event: event is not self._last, reversed(events)))[::-1]
        self._last = events[-1]
        for number, same in groupby(fresh, key=lambda event: event.step):
            self._write(_line(number, same))

    def _write(self, line: str) -> None:
        self._lines += 1
        if self._lines <= _LINES:
            _LOGGER.warning(line)
        if self._lines == _LINES:
            _LOGGER.warning("further events are not logged; see callback.session.events")


def _line(number: int, events: Iterable[Event]) -> str:
    """Return one line about the events of a step, with tensors named once."""
    line = f"step {number}"
    for event in events:
        line += f"; {event.kind}{f' ({event.plugin})' if event.plugin else ''}"
        line += f": {event.message}" if event.message else ""
        if event.tensors and event.tensors[0] not in line:
            more = len(event.tensors) - _NAMED
            line += f" in {', '.join(event.tensors[:_NAMED])}"
            line += f" and {more} more" if more > 0 else ""
    return line
