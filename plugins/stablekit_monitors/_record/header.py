"""run.json, the file that makes a folder a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stablekit_monitors._record.chunk_file import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
HEADER = "run.json"
EVENTS = "events.jsonl"


def read_header(path: Path) -> dict[str, Any]:
    """Return what a run.json holds.

    Raises:
        ValueError: It is damaged or of another format.
    """
    try:
        header: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT}, got {found!r}")
    return dict(header)


def write_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write a run.json, one entry a line."""
    entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items())
    replace_file(path, "{{\n{}\n}}\n".format(",\n".join(entries)).encode())
