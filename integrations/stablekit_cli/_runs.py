"""What the commands that take a recorded run have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit_monitors.run_log import read_run

if TYPE_CHECKING:
    from pathlib import Path

    from stablekit_monitors.run_log import RunLog

__all__ = ["NoRunError", "name_of", "open_run"]


class NoRunError(ValueError):
    """The folder is not a run that can be read; the message says what was found."""


def open_run(folder: Path) -> RunLog:
    """Read a run.

    Raises:
        NoRunError: There is none.
    """
    try:
        return read_run(folder)
    except (FileNotFoundError, ValueError) as error:
        raise NoRunError(str(error)) from error


def name_of(folder: Path) -> str:
    """Return what to call a run: its folder, below the one that holds it."""
    path = folder.resolve()
    return "/".join(path.parts[-2:]) if len(path.parts) > 2 else path.name
