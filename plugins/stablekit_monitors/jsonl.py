"""Metrics and events as lines of JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, final

from stablekit import hookimpl
from stablekit.arguments import plugin_name
from stablekit_monitors._lines import LineFile
from stablekit_monitors._paths import path_of, with_temporary_folder
from stablekit_monitors._ranks import writes_here

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from stablekit import Event, Session

__all__ = ["JSONLines"]


@final
class JSONLines:
    """Write metrics and events to a file, one JSON object a line.

    Metrics, every ``log_every`` steps: ``{"step": 10, "time": 1700000000.5, "loss": 2.5, ...}``.
    Events, when they are heard of: ``{"step": 7, "time": ..., "event": "skip", "plugin": ...,
    "message": ..., "tensors": [...], "data": {...}}``.

    The JSON is strict. It has no NaN and no infinity, so these are the strings ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"``, which Python's ``float`` and JavaScript's ``Number``
    understand. Each line is handed to the system at once: a process that is killed leaves at most
    one unfinished line, which the next one cuts off. Lines are added to a file that is there
    already, so a run resumed from a checkpoint writes some steps again; the later lines count.

    Of several processes only the first writes.

    Args:
        path: the file; the folders above it are made.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``path`` is neither a string nor a path.

    Example:
        >>> import json, pathlib, tempfile, torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "metrics.jsonl")
        ...     with stablekit.attach(optimizer, JSONLines(path)):
        ...         p.grad = torch.tensor([3.0, 4.0])
        ...         optimizer.step()
        ...     line = json.loads(path.read_text())
        >>> line["step"], line["grad_norm"]
        (1, 5.0)
    """

    cost = "a line of text every `log_every` steps"

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        """Keep the path; the file is opened when there is something to write."""
        self.path = path_of("path", path)
        self.name = plugin_name(name, "jsonl")
        self._file: LineFile | None = None

    @classmethod
    def example(cls) -> JSONLines:
        """Return one that writes into a temporary folder."""
        return with_temporary_folder(lambda folder: cls(folder / "metrics.jsonl"))

    @hookimpl
    def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics."""
        self._write({"step": number, "time": _now(), **metrics})

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Write the event."""
        about = event.as_dict()
        line = {"step": about.pop("step"), "time": _now(), "event": about.pop("kind"), **about}
        self._write(line)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if not writes_here():
            return
        if self._file is None:
            self._file = LineFile(self.path)
        self._file.write(line)


def _now() -> float:
    return round(time.time(), 3)
