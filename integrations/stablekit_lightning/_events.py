"""What was out of the ordinary, as warnings in the log."""

from __future__ import annotations

import logging
from itertools import takewhile
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from stablekit import Event, Session

_LOGGER = logging.getLogger("stablekit_lightning")
_LINES = 20


@final
class EventLog:
    """Writes the new events of one session, until there were too many."""

    def __init__(self, session: Session) -> None:
        """Take the events so far, perhaps of a checkpoint, as told."""
        self.session = session
        self._last: Event | None = next(reversed(session.events), None)
        self._lines = 0

    def tell(self) -> None:
        """Write what was emitted since the last call."""
        events = self.session.events
        fresh = list(takewhile(lambda event: event is not self._last, reversed(events)))[::-1]
        for event in fresh:
            self._write(f"step {event.step}: {event.kind}: {event.message}")
        self._last = events[-1] if events else None

    def _write(self, line: str) -> None:
        self._lines += 1
        if self._lines <= _LINES:
            _LOGGER.warning(line)
        if self._lines == _LINES:
            _LOGGER.warning("further events are not logged; see callback.session.events")
