"""Reading the log of a run that a :class:`~stablekit_monitors.Recorder` writes or has written.

A run is a folder::

    run.json             what was recorded: names and shapes of tensors, plugins, optimizers
    chunk-00000001.npz   rows of steps by the thousand, in recorded order
    events.jsonl         one event a line

It can be read at any moment: while it is written, and after the writer was killed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from stablekit.errors import StablekitWarning
from stablekit_monitors._record.chunk import (
    OBSERVED,
    Bools,
    Chunk,
    Doubles,
    Floats,
    Ints,
    current,
    join,
    no_rows,
    placed,
)
from stablekit_monitors._record.chunk_file import chunk_paths, read_chunk
from stablekit_monitors._record.event_file import EventTail, current_events
from stablekit_monitors._record.header import EVENTS, HEADER, read_header

if TYPE_CHECKING:
    import os

    from stablekit import Event

__all__ = ["RunLog", "RunReader", "read_run"]


@final
@dataclass(frozen=True)
class RunLog:
    """A run as far as it is recorded: T rows of steps, P tensors.

    Of a run that went back, because it was resumed from a checkpoint or rolled back, this is what
    counts in the end: rows and events of steps that were given up are not in it.
    """

    header: dict[str, Any]
    """What run.json holds."""
    names: tuple[str, ...]
    """Names of the tensors, ``P`` of them."""
    steps: Ints
    """int64 ``[T]``, increasing: ``Step.number`` of each row."""
    scalars: dict[str, Doubles]
    """float64 ``[T]`` by metric; NaN where it was NaN, and where it was not recorded."""
    norms: Floats
    """float32 ``[T, P]``: gradient norms as backward left them, 0 without a gradient."""
    present: Bools
    """bool ``[T, P]``: whether a tensor had a gradient."""
    ok: Bools
    """bool ``[T]``: false where the step was skipped."""
    has_loss: Bools
    """bool ``[T]``: whether a loss was observed, which may have been NaN."""
    stride: Ints
    """int64 ``[T]``: how many steps a row stands for, itself and those left out before it."""
    events: list[Event]
    """The events, by step."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.steps)


def read_run(path: str | os.PathLike[str]) -> RunLog:
    """Read the log of a run.

    Args:
        path: the folder that was given to the recorder.

    Raises:
        FileNotFoundError: The folder is not there, or is no run.
        ValueError: The run is of another format, or run.json is damaged.

    Warns:
        StablekitWarning: A chunk or a line of events is damaged; it is left out.

    Example:
        >>> import tempfile, torch, stablekit
        >>> from stablekit_monitors import Recorder, read_run
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with stablekit.attach(optimizer, Recorder(folder)):
        ...         for scale in (1.0, 2.0):
        ...             p.grad = torch.tensor([3.0, 4.0]) * scale
        ...             optimizer.step()
        ...     run = read_run(folder)
        >>> run.steps.tolist(), run.norms.tolist(), run.scalars["lr"].tolist()
        ([1, 2], [[5.0], [10.0]], [1.0, 1.0])
    """
    return RunReader(path).update()


@final
class RunReader:
    """Reads a run again and again while it grows, each time only what is new.

    Args:
        path: the folder that was given to the recorder.

    Raises:
        FileNotFoundError: The folder is not there, or is no run.
        ValueError: The run is of another format, or run.json is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Look whether there is a run."""
        self.path = Path(path)
        self._header: dict[str, Any] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._chunks: dict[Path, Chunk] = {}
        self._tail = EventTail(self.path / EVENTS)
        self._log: RunLog | None = None
        self._read_header()

    def update(self) -> RunLog:
        """Return the run as it is now; the same object as before if nothing is new.

        Raises:
            FileNotFoundError: The run is gone.
            ValueError: run.json is damaged or of another run.
        """
        has_news = self._log is None
        while True:
            has_news |= self._read_chunks() | self._tail.update()
            # Read last, since it is written before the rows that need it. If it is another one,
            # this may be another run.
            if not self._read_header():
                break
            has_news = True
        if self._log is None or has_news:
            self._log = self._assembled()
        return self._log

    def _assembled(self) -> RunLog:
        names = tuple(self._header["names"])
        chunks = [self._chunks[path] for path in sorted(self._chunks)]
        rows = current(join(chunks or [no_rows()]))
        if len(rows.columns) and rows.columns[-1] >= len(names):
            raise ValueError(f"{self.path / HEADER} does not name all tensors that were recorded")
        rows = placed(rows, np.arange(len(names)))
        scalars: dict[str, Doubles] = dict(zip(rows.keys, rows.scalars.T, strict=True))
        observed = scalars.pop(OBSERVED, None)
        return RunLog(
            header=self._header,
            names=names,
            steps=rows.steps,
            scalars=scalars,
            norms=rows.norms,
            present=rows.present,
            ok=rows.ok,
            has_loss=_has_loss(scalars.get("loss"), observed, rows.norms),
            stride=rows.stride,
            events=sorted(current_events(self._tail.events), key=lambda event: event.step),
        )

    def _read_header(self) -> bool:
        path = self.path / HEADER
        if not path.is_file():
            is_folder = self.path.is_dir()
            raise FileNotFoundError(
                f"{self.path} is no recorded run: there is no {HEADER} in it"
                if is_folder
                else f"there is no recorded run at {self.path}: it is not a folder"
            )
        if not self._is_new(path):
            return False
        self._header = read_header(path)
        return True

    def _read_chunks(self) -> bool:
        """Read new and changed files; begin again if one goes away between listing and reading."""
        while True:
            paths = chunk_paths(self.path)
            fresh = [path for path in paths if self._is_new(path)]
            try:
                read = {path: chunk for path in fresh if (chunk := _readable(path)) is not None}
            except FileNotFoundError:
                for path in fresh:
                    self._stamps.pop(path, None)
                continue
            kept = {path: self._chunks[path] for path in paths if path in self._chunks}
            is_less = len(kept) < len(self._chunks)
            self._chunks = {**kept, **read}
            return bool(fresh) or is_less

    def _is_new(self, path: Path) -> bool:
        """Tell whether a file is another one than when it was last asked about."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return True
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        before, self._stamps[path] = self._stamps.get(path), stamp
        return stamp != before


def _has_loss(loss: Doubles | None, observed: Doubles | None, norms: Floats) -> Bools:
    """Tell for each row whether a loss was observed.

    A log that does not say so is from before it was recorded: in it a NaN is taken for a loss where
    gradients are not finite either.
    """
    if loss is None:
        return np.zeros(len(norms), np.bool_)
    said = ~np.isfinite(norms).all(axis=1) if observed is None else observed == 1
    found: Bools = ~np.isnan(loss) | said
    return found


def _readable(path: Path) -> Chunk | None:
    try:
        return read_chunk(path)
    except ValueError as error:
        warnings.warn(f"{error}; its steps are left out", StablekitWarning, stacklevel=4)
        return None
