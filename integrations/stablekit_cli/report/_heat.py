"""The norms of all tensors over the steps as a table of 16-bit codes, the largest of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stablekit_monitors.run_log import RunLog

__all__ = ["ABSENT", "INF", "LAST", "NAN", "ZERO", "Heat", "decoded", "heat_of"]

CELLS = 450_000
COLUMNS = 1500
ROWS = 1500
BLOCK = 4_000_000

ABSENT, ZERO, FIRST, LAST, INF, NAN = 0, 1, 2, 65_000, 65_534, 65_535
"""Codes without a number; FIRST to LAST are even steps of the logarithm from low to high."""


@dataclass(frozen=True)
class Heat:
    """Columns of equal width in steps, rows in model order."""

    names: tuple[str, ...]
    """A row's tensor, or the first and the last of several."""
    first: int
    """The first step of the first column."""
    width: int
    """Steps a column."""
    low: float
    """Decimal logarithm of code FIRST."""
    high: float
    """Decimal logarithm of code LAST."""
    codes: NDArray[np.uint16]
    """``[rows, columns]``."""


def heat_of(run: RunLog) -> Heat | None:
    """Return the table, None for a run without norms."""
    if not run.norms.size:
        return None
    joined = -(-len(run.names) // ROWS)
    first, names = int(run.steps[0] - run.stride[0] + 1), _joined_names(run.names, joined)
    widest = max(1, min(COLUMNS, CELLS // len(names)))
    span = int(run.steps[-1] - first + 1)
    width = -(-span // widest)
    starts, source = _columns(run, first, width, -(-span // width))
    values = _join_rows(_largest(run, starts)[source], joined)
    finite = values[np.isfinite(values) & (values > 0)]
    low, high = _limits(finite)
    return Heat(names, first, width, low, high, _codes(values.T, low, high))


def decoded(heat: Heat) -> NDArray[np.float64]:
    """Return the numbers that the codes stand for: NaN for NaN, -1 for no gradient."""
    scale = (heat.high - heat.low) / (LAST - FIRST)
    values = 10 ** (heat.low + (heat.codes.astype(np.float64) - FIRST) * scale)
    for code, value in ((ABSENT, -1.0), (ZERO, 0.0), (INF, np.inf), (NAN, np.nan)):
        values[heat.codes == code] = value
    return values


def _joined_names(names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Name the rows; more tensors than rows are shown in groups of neighbours."""
    if size == 1:
        return names
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    return tuple(f"{group[0]} ... {group[-1]}" for group in groups)


def _columns(
    run: RunLog, first: int, width: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the rows of each column that has some begin, and which of these each shows.

    A column without a row, in a log that was thinned, shows the row that stands for its steps: the
    next one.
    """
    filled, starts = np.unique((run.steps - first) // width, return_index=True)
    source = np.searchsorted(filled, np.arange(count))
    return starts.astype(np.int64), source.astype(np.int64)


def _largest(run: RunLog, starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the largest norm of each tensor in each stretch: NaN over Inf over numbers over -1."""
    table = np.empty((len(starts), run.norms.shape[1]), dtype=np.float32)
    ends = np.append(starts[1:], len(run.steps))
    at_once = max(1, BLOCK // run.norms.shape[1])
    block = 0
    while block < len(starts):
        stop = max(block + 1, int(np.searchsorted(ends, starts[block] + at_once, side="right")))
        rows = slice(int(starts[block]), int(ends[stop - 1]))
        norms = np.where(run.present[rows], run.norms[rows], np.float32(-1))
        np.maximum.reduceat(
            norms, starts[block:stop] - starts[block], axis=0, out=table[block:stop]
        )
        block = stop
    return table


def _join_rows(table: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    if size == 1:
        return table
    joined: NDArray[np.float32] = np.maximum.reduceat(
        table, np.arange(0, table.shape[1], size), axis=1
    )
    return joined


def _limits(finite: NDArray[np.float32]) -> tuple[float, float]:
    if not finite.size:
        return 0.0, 1.0
    low, high = np.log10(float(finite.min())), np.log10(float(finite.max()))
    return float(low), float(max(high, low + 1e-6))


def _codes(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint16]:
    codes = np.zeros(values.shape, dtype=np.uint16)
    usual = np.isfinite(values) & (values > 0)
    scale = (LAST - FIRST) / (high - low)
    codes[usual] = np.rint(FIRST + (np.log10(values[usual].astype(np.float64)) - low) * scale)
    codes[values == 0] = ZERO
    codes[np.isposinf(values)] = INF
    codes[np.isnan(values)] = NAN
    return codes
