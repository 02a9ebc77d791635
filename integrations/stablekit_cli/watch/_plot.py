"""A line plot in a terminal: eight dots a character, or plain signs where there are no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

from stablekit_cli.report._text import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Line", "Plot", "dots"]

AXIS = 9
BRAILLE = 0x2800
# Bits of the dots of one braille character, by row and column.
BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True)
class Line:
    """Values at even distances, oldest first."""

    values: NDArray[np.float64]
    style: str


@dataclass(frozen=True)
class Plot:
    """Several lines over one scale, as wide as there is room."""

    lines: Sequence[Line]
    height: int
    log: bool = False

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take any width of at least a few characters."""
        return Measurement(AXIS + 4, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the lines over one another, the first on top."""
        width = max(4, options.max_width - AXIS)
        low, high = _limits([line.values for line in self.lines], log=self.log)
        fine = (1, 1) if options.ascii_only else (4, 2)
        signs = [[" "] * width for _ in range(self.height)]
        styles: list[list[str]] = [[""] * width for _ in range(self.height)]
        for line in reversed(self.lines):
            grid = dots(
                _scaled(line.values, low, high, log=self.log),
                (self.height * fine[0], width * fine[1]),
            )
            _put(grid, fine, line.style, signs, styles)
        for row in range(self.height):
            label = {0: number(high), self.height - 1: number(low)}.get(row, "")
            yield Segment(f"{label:>{AXIS - 1}} ", Style(dim=True))
            for sign, style in zip(signs[row], styles[row], strict=True):
                yield Segment(sign, Style.parse(style) if style else None)
            yield Segment.line()


def dots(heights: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which dots to set, ``[rows, columns]``, row 0 on top.

    Each column shows everything between the smallest and the largest value that falls into it, so
    that no spike gets lost, and joins on to the column before.

    Args:
        heights: from 0 at the bottom to 1 at the top; NaN where there is nothing.
        shape: rows and columns.

    Example:
        >>> import numpy as np
        >>> dots(np.array([0.0, 1.0]), (2, 2)).astype(int).tolist()
        [[0, 1], [1, 1]]
    """
    rows, columns = shape
    grid = np.zeros(shape, dtype=bool)
    before: tuple[int, int] | None = None
    for column, part in enumerate(_parts(heights, columns)):
        known = part[np.isfinite(part)]
        if not known.size:
            before = before if not part.size else None
            continue
        places = np.rint((1 - known.clip(0, 1)) * (rows - 1)).astype(int)
        top, bottom = int(places.min()), int(places.max())
        drawn = (top, bottom)
        if before is not None:
            top, bottom = min(top, before[1]), max(bottom, before[0])
        grid[top : bottom + 1, column] = True
        before = drawn
    return grid


def _parts(values: NDArray[np.float64], columns: int) -> list[NDArray[np.float64]]:
    """Cut values into one part a column; few values are spread, with nothing in between."""
    edges = np.linspace(0, len(values), columns + 1).astype(int)
    return [values[start:stop] for start, stop in pairwise(edges)]


def _put(
    grid: NDArray[np.bool_],
    fine: tuple[int, int],
    style: str,
    signs: list[list[str]],
    styles: list[list[str]],
) -> None:
    """Write the characters of one line over those that are there."""
    blocks = grid.reshape(len(signs), fine[0], -1, fine[1]).swapaxes(1, 2)
    for row, column in zip(*np.nonzero(blocks.any(axis=(2, 3))), strict=True):
        signs[row][column] = "*" if fine == (1, 1) else _braille(blocks[row, column])
        styles[row][column] = style


def _braille(block: NDArray[np.bool_]) -> str:
    return chr(
        BRAILLE + sum(BITS[row][column] for row, column in zip(*block.nonzero(), strict=True))
    )


def _limits(series: Sequence[NDArray[np.float64]], *, log: bool) -> tuple[float, float]:
    values = np.concatenate([*series, np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not values.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if low == high:
        return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return low, high


def _scaled(
    values: NDArray[np.float64], low: float, high: float, *, log: bool
) -> NDArray[np.float64]:
    if not log:
        return (values - low) / (high - low)
    usable = np.where(values > 0, values, math.nan)
    heights: NDArray[np.float64] = np.log(usable / low) / math.log(high / low)
    return heights
