"""Rows of a run log in memory: joining chunks, dropping what a resumed run did again, thinning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

OBSERVED = "loss_observed"
"""The value of a row that is no metric: 1 where a loss was observed, which may have been NaN."""

# Thinning keeps, besides every second row, the largest of these in each block of so many rows.
_PEAKS_OF = ("loss", "grad_norm")
_BLOCK = 32


@final
@dataclass(frozen=True)
class Chunk:
    """T rows of P tensors and M metrics, in the order in which they were recorded."""

    steps: Ints
    """``Step.number`` of each row."""
    stride: Ints
    """How many steps a row stands for: itself and those just before it."""
    ok: Bools
    """False where the step was skipped."""
    keys: tuple[str, ...]
    """Names of the metrics."""
    scalars: Doubles
    """[T, M]; NaN where the metric was NaN, and where it was not recorded."""
    norms: Floats
    """[T, P]; gradient norms before anything changed them, 0 where there was no gradient."""
    present: Bools
    """[T, P]; whether a tensor had a gradient."""
    columns: Ints
    """[P]; positions of the tensors in the names of the run."""
    level: int = 0
    """How often the rows were thinned."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.steps)

    def take(self, keep: Bools) -> Chunk:
        """Return some of the rows."""
        return replace(
            self,
            steps=self.steps[keep],
            stride=self.stride[keep],
            ok=self.ok[keep],
            scalars=self.scalars[keep],
            norms=self.norms[keep],
            present=self.present[keep],
        )


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return the rows of at least one chunk one after another, over all their tensors and metrics.

    A tensor that a chunk does not know had no gradient in it.
    """
    columns = chunks[0].columns
    if not all(np.array_equal(chunk.columns, columns) for chunk in chunks):
        columns = np.unique(np.concatenate([chunk.columns for chunk in chunks]))
    keys = tuple(dict.fromkeys(key for chunk in chunks for key in chunk.keys))
    aligned = [placed(_keyed(chunk, keys), columns) for chunk in chunks]
    return Chunk(
        np.concatenate([chunk.steps for chunk in aligned]),
        np.concatenate([chunk.stride for chunk in aligned]),
        np.concatenate([chunk.ok for chunk in aligned]),
        keys,
        np.concatenate([chunk.scalars for chunk in aligned]),
        np.concatenate([chunk.norms for chunk in aligned]),
        np.concatenate([chunk.present for chunk in aligned]),
        columns,
        max(chunk.level for chunk in aligned),
    )


def placed(chunk: Chunk, columns: Ints) -> Chunk:
    """Return the same rows over other tensors, those of the chunk and more."""
    if np.array_equal(chunk.columns, columns):
        return chunk
    norms = np.zeros((len(chunk), len(columns)), np.float32)
    present = np.zeros((len(chunk), len(columns)), np.bool_)
    where = [columns.tolist().index(column) for column in chunk.columns.tolist()]
    norms[:, where] = chunk.norms
    present[:, where] = chunk.present
    return replace(chunk, norms=norms, present=present, columns=columns)


def no_rows() -> Chunk:
    """Return a chunk of nothing, to be joined with others."""
    nothing = np.zeros(0, np.int64)
    return Chunk(
        nothing,
        nothing,
        np.zeros(0, np.bool_),
        (),
        np.zeros((0, 0)),
        np.zeros((0, 0), np.float32),
        np.zeros((0, 0), np.bool_),
        nothing,
    )


def current(chunk: Chunk) -> Chunk:
    """Drop the rows that a run did again after it went back: of each step the last row counts.

    More than that: a row of step s makes all earlier rows of steps from s on those of a run that
    was given up, even where the new one has not come that far yet.
    """
    if len(chunk) == 0:
        return chunk
    lowest_after = np.minimum.accumulate(chunk.steps[::-1])[::-1]
    keep = np.ones(len(chunk), np.bool_)
    keep[:-1] = chunk.steps[:-1] < lowest_after[1:]
    return chunk if keep.all() else chunk.take(keep)


def thinned(chunk: Chunk, marked: Bools) -> Chunk:
    """Return about half of the rows; each stands for the dropped ones before it, too.

    Kept are every second row, the last, the peaks of loss and norm, and marked rows as long as they
    are few: of more than one in 16 only some are kept.

    Args:
        chunk: at least one row.
        marked: bool [T], rows of interest; skipped and non-finite steps are added to them.
    """
    count = len(chunk)
    keep = np.zeros(count, np.bool_)
    keep[1::2] = keep[-1] = True
    keep[_few(np.flatnonzero(marked | ~chunk.ok | _not_finite(chunk)), max(count // 16, 1))] = True
    for key in _PEAKS_OF:
        if key in chunk.keys:
            keep[_peaks(chunk.scalars[:, chunk.keys.index(key)])] = True
    covered = np.cumsum(chunk.stride)[keep]
    return replace(
        chunk.take(keep), stride=np.diff(covered, prepend=np.int64(0)), level=chunk.level + 1
    )


def _keyed(chunk: Chunk, keys: tuple[str, ...]) -> Chunk:
    if chunk.keys == keys:
        return chunk
    scalars = np.full((len(chunk), len(keys)), np.nan)
    scalars[:, [keys.index(key) for key in chunk.keys]] = chunk.scalars
    return replace(chunk, keys=keys, scalars=scalars)


def _not_finite(chunk: Chunk) -> Bools:
    return np.logical_not(np.isfinite(chunk.norms).all(axis=1, keepdims=True))[:, 0]


def _few(rows: Ints, limit: int) -> Ints:
    """Return at most so many of the rows, evenly spread."""
    return rows if len(rows) <= limit else rows[:: -(-len(rows) // limit)]


def _peaks(values: Doubles) -> Ints:
    """Return the row of the largest finite value of every block of rows."""
    blocks = -(-len(values) // _BLOCK)
    padded = np.full(blocks * _BLOCK, -np.inf)
    padded[: len(values)] = np.where(np.isfinite(values), values, -np.inf)
    table = padded.reshape(blocks, _BLOCK)
    rows: Ints = np.arange(blocks) * _BLOCK + table.argmax(axis=1)
    is_any: Bools = np.isfinite(table.max(axis=1))
    return rows[is_any]
