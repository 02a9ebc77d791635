"""Paths given to plugins, and temporary ones for the examples of those plugins."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave.

    Raises:
        TypeError: It is neither a string nor a path.
        ValueError: It is empty.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a string or a path, got {value!r}")
    if not os.fspath(value):
        raise ValueError(f"{name} must be a path, got {value!r}")
    return Path(value)


def with_temporary_folder(make: Callable[[Path], T]) -> T:
    """Return what ``make`` makes of a new folder, which goes away with it or with the process."""
    folder = Path(tempfile.mkdtemp(prefix="stablekit-"))
    made = make(folder)
    weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
    return made
