"""The folder of a run that is being recorded: whose it is, and what is added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from stablekit import Event
from stablekit_monitors._record.chunk import Chunk, Ints, join
from stablekit_monitors._record.chunk_shelf import ChunkShelf
from stablekit_monitors._record.event_file import RESUMED, EventFile
from stablekit_monitors._record.header import EVENTS, FORMAT, HEADER, read_header, write_header
from stablekit_monitors._record.moving import move_aside

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SHARE_OF_EVENTS = 4


@final
class RunFolder:
    """Adds rows and events to the folder of a run.

    Args:
        path: the folder; it is made if it is missing.
        about: what goes into run.json besides the names and shapes of tensors.
        rows: how many rows make a file.
        max_bytes: how much all files together may hold; None for no limit. A quarter is for events.
        first: number of the first step to come; from 2 on, a run that is there is continued.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        *,
        rows: int,
        max_bytes: int | None,
        first: int,
    ) -> None:
        """Take over the folder."""
        self._path = path
        self._rows = rows
        self._max_bytes = max_bytes
        path.mkdir(parents=True, exist_ok=True)
        if first == 1:
            move_aside(path)
        self._header: dict[str, Any] = {"names": [], "shapes": []}
        is_there = (path / HEADER).exists()
        if is_there:
            before = read_header(path / HEADER)
            self._header |= {key: before[key] for key in ("names", "shapes", "started")}
        self._header = {**about, **self._header, "format": FORMAT, "chunk": rows}
        self._write_header()
        self._shelf = ChunkShelf(path)
        self._newest: Chunk | None = None
        self._events: EventFile | None = None
        if is_there:
            self.go_back(first)

    def columns(self, shapes: Mapping[str, list[int]]) -> Ints:
        """Return the positions of tensors among those of the run, which learns of new ones."""
        names = self._header["names"]
        places = {name: i for i, name in enumerate(names)}
        if new := [name for name in shapes if name not in places]:
            self._check_owner()
            names += new
            self._header["shapes"] += [shapes[name] for name in new]
            self._write_header()
            places = {name: i for i, name in enumerate(names)}
        self._close_newest()
        return np.array([places[name] for name in shapes], np.int64)

    @property
    def room(self) -> int:
        """How many rows the newest file still takes."""
        return self._rows - (0 if self._newest is None else len(self._newest))

    def add(self, rows: Chunk) -> None:
        """Add rows, of the same tensors since :meth:`columns` was called."""
        self._check_owner()
        if self._newest is not None:
            rows = join([self._newest, rows])
        self._newest = rows
        self._shelf.put(rows)
        if len(rows) >= self._rows:
            self._close_newest()
        self._fit()

    def add_event(self, event: Event) -> None:
        """Add an event."""
        if self._events is None:
            self._events = EventFile(self._path / EVENTS)
        self._events.write(event)
        self._fit()

    def go_back(self, number: int) -> None:
        """Note that the run goes on with a step that is not the one after the last."""
        message = f"the run goes on with step {number}; what was recorded from there on is void"
        self.add_event(Event(RESUMED, number, message=message))

    def close(self) -> None:
        """Close what is open."""
        if self._events is not None:
            self._events.close()

    def _close_newest(self) -> None:
        if self._newest is not None:
            self._newest = None
            self._shelf.advance()

    def _fit(self) -> None:
        if self._max_bytes is None:
            return
        left, marked = self._max_bytes, set[int]()
        if self._events is not None:
            self._events.fit(self._max_bytes // _SHARE_OF_EVENTS)
            left, marked = left - self._events.size, self._events.steps
        self._shelf.fit(left, marked)

    def _write_header(self) -> None:
        write_header(self._path / HEADER, self._header)
        self._stamp = _stamp(self._path / HEADER)

    def _check_owner(self) -> None:
        """Refuse to write between the lines of another process."""
        if _stamp(self._path / HEADER) != self._stamp:
            raise RuntimeError(
                f"{self._path} is recorded into by another process since; give every run that goes"
                " on at the same time a folder of its own"
            )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
