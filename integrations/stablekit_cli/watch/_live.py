"""Following a run until Ctrl-C: waiting for it, reading what is new, drawing it again."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, final

from rich.live import Live

from stablekit_cli._runs import NoRunError, name_of
from stablekit_cli.watch._frame import Pulse, frame, waiting
from stablekit_monitors.run_log import RunReader

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, RenderableType

    from stablekit_monitors.run_log import RunLog

__all__ = ["watch"]

REMEMBERED = 20
RECORDED = ("run.json", "chunk-*", "tail*", "events.jsonl")
"""Files that a recorder writes; reports and charts in the folder are later."""


def watch(folder: Path, console: Console, *, once: bool, every: float, last: int) -> None:
    """Show a run until the user has seen enough.

    Args:
        folder: where it is recorded.
        console: where to draw.
        once: draw one picture and return.
        every: seconds between two looks.
        last: how many rows the plots show; 0 for all.

    Raises:
        NoRunError: ``once``, and there is no run.
    """
    eye = _Eye(folder, console, last)
    if once:
        picture = eye.look()
        if picture is None:
            raise NoRunError(f"there is no run in {folder} yet")
        console.print(picture)
        return
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(eye.look() or waiting(folder), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        console.print(eye.look() or waiting(folder))


@final
class _Eye:
    """Looks at a folder again and again."""

    def __init__(self, folder: Path, console: Console, last: int) -> None:
        self._folder = folder
        self._console = console
        self._last = last
        self._reader: RunReader | None = None
        self._seen: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)

    def look(self) -> RenderableType | None:
        """Return a picture of the run as it is now, None while there is none."""
        try:
            if self._reader is None:
                self._reader = RunReader(self._folder)
            run = self._reader.update()
        except FileNotFoundError:
            self._reader = None
            return None
        return frame(
            name_of(self._folder),
            run,
            Pulse(self._rate(run), self._age()),
            last=self._last,
            height=self._console.height if self._console.is_terminal else 40,
        )

    def _rate(self, run: RunLog) -> float | None:
        """Return steps a second while it was watched; a log has no times to tell of before."""
        if not len(run):
            return None
        step = int(run.steps[-1])
        if not self._seen or self._seen[-1][1] != step:
            self._seen.append((time.monotonic(), step))
        (first, low), (latest, high) = self._seen[0], self._seen[-1]
        return (high - low) / (latest - first) if high > low else None

    def _age(self) -> float | None:
        written = self._written()
        return None if written is None else max(0.0, time.time() - written)

    def _written(self) -> float | None:
        paths = [path for form in RECORDED for path in self._folder.glob(form)]
        times = [path.stat().st_mtime for path in paths if path.is_file()]
        return max(times, default=None)
