"""The events of a run in a file: adding them, thinning them out, reading what is new."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, final

from stablekit import Event
from stablekit.errors import StablekitWarning
from stablekit_monitors._lines import LineFile, decode, encode
from stablekit_monitors._record.chunk_file import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RESUMED = "recorder-resumed"
"""Kind of the event that a recorder adds where a run goes on from an earlier step."""


@final
class EventFile:
    """Adds events to a file and knows which steps they are from."""

    def __init__(self, path: Path) -> None:
        """Open a file, perhaps one that holds events already."""
        self._path = path
        self._open()

    def write(self, event: Event) -> None:
        """Add an event."""
        self.size += self._lines.write(event.as_dict())
        self.steps.add(event.step)

    def fit(self, limit: int) -> None:
        """Drop every second event of the older half, again and again until the rest fits."""
        if self.size <= limit:
            return
        lines = [f"{encode(event.as_dict())}\n".encode() for event in read_events(self._path)]
        while len(lines) > 1 and sum(map(len, lines)) > limit:
            half = len(lines) // 2
            lines = lines[:half][1::2] + lines[half:]
        self.close()
        replace_file(self._path, b"".join(lines))
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _open(self) -> None:
        self._lines = LineFile(self._path)
        self.size = self._path.stat().st_size
        self.steps = {event.step for event in read_events(self._path)}


@final
class EventTail:
    """Reads events that others add to a file, each of them once."""

    def __init__(self, path: Path) -> None:
        """Start before the first line; the file need not be there yet."""
        self.events: list[Event] = []
        self._path = path
        self._file_id = 0
        self._read_to = 0

    def update(self) -> bool:
        """Read what is new; tell whether there was anything."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            was_there, self.events, self._file_id = bool(self.events), [], 0
            return was_there
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._file_id or stat.st_size < self._read_to:
                self.events, self._file_id, self._read_to = [], stat.st_ino, 0
            file.seek(self._read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.decode().splitlines():
            self._add(line)
        return bool(whole)

    def _add(self, line: str) -> None:
        try:
            self.events.append(Event.from_dict(decode(line)))
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{self._path}: a line is damaged and left out ({error}): {line[:80]!r}",
                StablekitWarning,
                stacklevel=2,
            )


def read_events(path: Path) -> list[Event]:
    """Return the events of a file that count, in the order in which they were written."""
    tail = EventTail(path)
    tail.update()
    return current_events(tail.events)


def current_events(events: Iterable[Event]) -> list[Event]:
    """Drop events of steps that a run did again after it went back."""
    kept: list[Event] = []
    for event in events:
        if event.kind == RESUMED:
            kept = [one for one in kept if one.step < event.step]
        kept.append(event)
    return kept
