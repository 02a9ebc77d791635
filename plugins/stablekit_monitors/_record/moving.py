"""Moving a finished run out of the way of a new one in the same folder."""

from __future__ import annotations

import itertools
import shutil
import warnings
from typing import TYPE_CHECKING

from stablekit.errors import StablekitWarning
from stablekit_monitors._record.chunk_file import chunk_paths
from stablekit_monitors._record.header import EVENTS, HEADER

if TYPE_CHECKING:
    from pathlib import Path


def move_aside(folder: Path) -> None:
    """Move the run that is in a folder, if any, into a folder ``earlier-<n>`` below it.

    Cut short at any point it leaves all rows in one of the two places, each of them a run.

    Warns:
        StablekitWarning: A run was moved.
    """
    files = [*chunk_paths(folder), *(path for path in [folder / EVENTS] if path.exists())]
    header = folder / HEADER
    if files:
        target = next(
            path for n in itertools.count(1) if not (path := folder / f"earlier-{n}").exists()
        )
        target.mkdir()
        if header.exists():
            shutil.copyfile(header, target / HEADER)
        for path in files:
            path.rename(target / path.name)
        warnings.warn(
            f"{folder} held the record of another run, which this one does not continue: it is in"
            f" {target} now",
            StablekitWarning,
            stacklevel=2,
        )
    header.unlink(missing_ok=True)
