"""A run while it is recorded: rows gather in a buffer and go to the folder now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from stablekit_monitors._record.buffer import OK, Buffer
from stablekit_monitors._record.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stablekit import Event, Step

_FEWEST_ROWS = 16
_FEWEST_FILES = 16
_BYTES_OF_METRICS = 256


@final
class Recording:
    """Takes rows and events of one session from its first step on.

    Args:
        path: the folder.
        about: what goes into run.json besides names and shapes.
        every: record each so many steps.
        chunk: how many rows make a file; fewer where ``max_bytes`` would not hold 16 such files.
        flush_seconds: write rows that are not a whole file yet after so many seconds.
        max_bytes: the limit of everything together, None for none.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        *,
        every: int,
        chunk: int,
        flush_seconds: float,
        max_bytes: int | None,
    ) -> None:
        """Wait for the first step."""
        self._path = path
        self._about = about
        self._every = every
        self._chunk = chunk
        self._flush_seconds = flush_seconds
        self._max_bytes = max_bytes
        self._folder: RunFolder | None = None
        self._buffer: Buffer | None = None
        self._last = 0
        self._flushed = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether something was recorded, and more may come."""
        return self._folder is not None

    def row(self, step: Step, values: Mapping[str, Tensor | float]) -> None:
        """Add a step; nothing is read from the device unless rows are due to be written."""
        buffer = self._buffer
        if buffer is None or buffer.names is not step.gradients.names:
            buffer = self._begin(step)
        row = {key: step.scalar(v) if isinstance(v, Tensor) else v for key, v in values.items()}
        buffer.add(step.number, step.gradients, {OK: step.flag(step.ok), **row})
        is_full = len(buffer) >= self.folder(step).room
        if is_full or time.monotonic() - self._flushed >= self._flush_seconds:
            self.flush()

    def folder(self, step: Step) -> RunFolder:
        """Return the folder, taken over at the first step."""
        if self._folder is None:
            self._last = step.number - 1
            self._folder = RunFolder(
                self._path,
                self._about,
                rows=self._rows(len(step.gradients.names)),
                max_bytes=self._max_bytes,
                first=step.number,
            )
        return self._folder

    def follow(self, step: Step) -> None:
        """Notice that a step is over, recorded or not; see where the run went back."""
        folder = self.folder(step)
        if step.number <= self._last:
            folder.go_back(step.number)
        self._last = step.number

    def event(self, event: Event, step: Step) -> None:
        """Add an event, perhaps of a step that was over long ago."""
        folder, number = self.folder(step), step.session.number
        if number < self._last:
            folder.go_back(number)
            self._last = number - 1
        folder.add_event(event)

    def flush(self) -> None:
        """Write all rows there are."""
        self._flushed = time.monotonic()
        if self._folder is not None and self._buffer is not None and len(self._buffer):
            self._folder.add(self._buffer.take())

    def close(self) -> None:
        """Write all rows and close the files."""
        self.flush()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _begin(self, step: Step) -> Buffer:
        self.flush()
        folder, gradients = self.folder(step), step.gradients
        params = zip(gradients.names, gradients.parameters, strict=True)
        columns = folder.columns({name: list(param.shape) for name, param in params})
        self._buffer = Buffer(gradients, columns, rows=folder.room, stride=self._every)
        return self._buffer

    def _rows(self, tensors: int) -> int:
        if self._max_bytes is None:
            return self._chunk
        row = 4 * tensors + _BYTES_OF_METRICS
        fitting = self._max_bytes // (_FEWEST_FILES * row)
        if fitting < _FEWEST_ROWS:
            raise ValueError(
                f"max_bytes must be at least {_FEWEST_FILES * _FEWEST_ROWS * row} for"
                f" {tensors} tensors, got {self._max_bytes}"
            )
        return min(self._chunk, fitting)
