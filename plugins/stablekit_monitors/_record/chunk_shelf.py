"""All chunk files of a run: the newest is written anew while it grows, old ones are thinned."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, final

import numpy as np

from stablekit.errors import StablekitWarning
from stablekit_monitors._record.chunk import Chunk, current, join, thinned
from stablekit_monitors._record.chunk_file import (
    chunk_number,
    chunk_path,
    chunk_paths,
    read_chunk,
    read_level,
    write_chunk,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Of the files, the newest quarter keeps every row.
_LEFT_ALONE = 4


@final
class ChunkShelf:
    """Chunk files by number, with their sizes and how often each was thinned."""

    def __init__(self, folder: Path) -> None:
        """Look at what is there; the next chunk comes after it."""
        self._folder = folder
        self._files: dict[int, tuple[int, int]] = {}
        paths = chunk_paths(folder)
        for path in paths:
            try:
                self._files[chunk_number(path)] = (path.stat().st_size, read_level(path))
            except ValueError as error:
                warnings.warn(f"{error}; it is left alone", StablekitWarning, stacklevel=2)
        self._next = max(map(chunk_number, paths), default=0) + 1

    @property
    def size(self) -> int:
        """How many bytes all files have together."""
        return sum(size for size, _ in self._files.values())

    def put(self, chunk: Chunk) -> None:
        """Write the newest file, in place of what it held."""
        size = write_chunk(chunk_path(self._folder, self._next), chunk)
        self._files[self._next] = (size, chunk.level)

    def advance(self) -> None:
        """Begin another file with the next chunk."""
        self._next += 1

    def fit(self, limit: int, marked: Iterable[int]) -> None:
        """Make pairs of old files into one, thinned, until the rest is within the limit.

        Args:
            limit: in bytes.
            marked: numbers of steps of interest.
        """
        steps = np.array(sorted(marked), np.int64)
        while self.size > limit and (pair := self._pair()) is not None:
            self._merge(*pair, steps)

    def _pair(self) -> tuple[int, int] | None:
        """Return neighbours that were thinned equally often, the least often and oldest first."""
        numbers = sorted(self._files)
        old = numbers[: len(numbers) - max(len(numbers) // _LEFT_ALONE, 1)]
        levels = {number: self._files[number][1] for number in old}
        return min(
            itertools.pairwise(old),
            key=lambda pair: (levels[pair[0]] != levels[pair[1]], levels[pair[1]], pair[0]),
            default=None,
        )

    def _merge(self, first: int, second: int, marked: np.ndarray) -> None:
        paths = [chunk_path(self._folder, number) for number in (first, second)]
        rows = current(join([read_chunk(path) for path in paths]))
        if len(rows):
            rows = thinned(rows, np.isin(rows.steps, marked))
        # If this is cut short between the two, the rows of the second are there twice, and a reader
        # takes the later ones.
        size = write_chunk(paths[0], rows)
        self._files[first] = (size, rows.level)
        paths[1].unlink()
        del self._files[second]
