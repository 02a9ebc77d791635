"""Files of one JSON object a line, to which only whole lines are ever added."""

from __future__ import annotations

import json
import math
import os
import weakref
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

_BLOCK = 1 << 16
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> str:  # noqa: ANN401 - any plain value
    """Return a value as one line of strict JSON.

    JSON has no NaN and no infinity: they become the strings "NaN", "Infinity" and "-Infinity", as
    Protobuf writes them. What JSON does not know at all becomes its ``str``.

    Example:
        >>> encode({"loss": float("nan"), "norms": [1.0, float("inf")]})
        '{"loss": "NaN", "norms": [1.0, "Infinity"]}'
    """
    return json.dumps(_strict(value), allow_nan=False, default=str)


def decode(line: str) -> Any:  # noqa: ANN401 - any plain value
    """Return the value that :func:`encode` wrote, its non-finite numbers as numbers again.

    Raises:
        ValueError: It is not JSON.

    Example:
        >>> decode('{"loss": "NaN", "norms": [1.0, "Infinity"]}')
        {'loss': nan, 'norms': [1.0, inf]}
    """
    return _loose(json.loads(line))


@final
class LineFile:
    """A file of lines, opened to be added to; each line is handed to the system at once.

    A process that is killed while it writes leaves at most one unfinished line at the end. The next
    one to open the file cuts it off.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and make it and the folders above it where they are missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _finish_last_line(path)
        self._file = path.open("ab")
        self.close = weakref.finalize(self, self._file.close)

    def write(self, value: Any) -> int:  # noqa: ANN401 - any plain value
        """Add a value as a line; return its length in bytes."""
        line = f"{encode(value)}\n".encode()
        self._file.write(line)
        self._file.flush()
        return len(line)


def _strict(value: Any) -> Any:  # noqa: ANN401 - any plain value
    if isinstance(value, float) and not math.isfinite(value):
        return next(w for w, v in _WORDS.items() if v == value or value != value)
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _loose(value: Any) -> Any:  # noqa: ANN401 - any plain value
    if isinstance(value, str):
        return _WORDS.get(value, value)
    if isinstance(value, dict):
        return {key: _loose(item) for key, item in value.items()}
    return [_loose(item) for item in value] if isinstance(value, list) else value


def _finish_last_line(path: Path) -> None:
    """End the last line of a file if it is whole, otherwise cut it off."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        start = _start_of_last_line(file)
        file.seek(start)
        last = file.read()
        try:
            decode(last.decode() or "null")
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n" if last else b"")


def _start_of_last_line(file: BinaryIO) -> int:
    """Return where the text after the last newline begins, reading from the end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(end - _BLOCK, 0)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
