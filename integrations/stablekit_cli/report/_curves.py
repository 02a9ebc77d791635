"""Loss, norms and thresholds thinned so that a page stays small and no spike disappears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from stablekit_monitors.run_log import RunLog

__all__ = ["Curve", "Curves", "curves_of", "kept_rows", "medians"]

BUCKETS = 1500
NEIGHBOURS = 100
MARKS = 60
THRESHOLDS = 6
LIMITS = {"loss": ("loss_threshold", "loss_limit"), "norm": ("threshold", "norm_limit")}
MEDIANS = 240
WINDOW = 10
SHORT = 1500


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    panel: str
    """ "loss" or "norm"."""
    role: str
    """ "raw", "median", "clipped" or "threshold"."""
    values: NDArray[np.float64]
    """One a kept row, NaN where there is none."""


@dataclass(frozen=True)
class Curves:
    """All lines over the steps they have in common."""

    steps: NDArray[np.int64]
    lines: tuple[Curve, ...]
    thinned: bool


def curves_of(run: RunLog, marked: Iterable[int]) -> Curves:
    """Choose rows and lines: the extremes of every stretch, and all rows around marked steps."""
    roles = {
        "loss": ("loss", "raw", "loss"),
        "grad_norm_clipped": ("norm", "clipped", "after clipping"),
        "grad_norm": ("norm", "raw", "gradient norm"),
    }
    shown = {key: run.scalars[key] for key in roles if key in run.scalars}
    rows = kept_rows([*shown.values()], np.searchsorted(run.steps, [*marked]))
    lines = [Curve(roles[key][2], *roles[key][:2], shown[key][rows]) for key in shown]
    lines += _limits(run, rows)
    if "loss" in shown and len(run.steps) >= 20 * WINDOW:
        lines.append(Curve("median", "loss", "median", medians(shown["loss"], rows)))
    return Curves(run.steps[rows], tuple(lines), len(rows) < len(run.steps))


def _limits(run: RunLog, rows: NDArray[np.int64]) -> Iterator[Curve]:
    """Yield what plugins hold loss and norm against, so many a panel."""
    for panel, endings in LIMITS.items():
        keys = [key for end in endings for key in run.scalars if key.endswith(f"/{end}")]
        for key in keys[:THRESHOLDS]:
            plugin, _, what = key.rpartition("/")
            label = f"{plugin} {what.removeprefix(f'{panel}_')}"
            yield Curve(label, panel, "threshold", run.scalars[key][rows])


def kept_rows(
    series: Sequence[NDArray[Any]], marked: NDArray[np.int64], buckets: int = BUCKETS
) -> NDArray[np.int64]:
    """Return the rows to draw, ascending.

    Of every bucket of rows those with the smallest, the largest and the first non-finite value of
    each series, its first row, and every row near a marked one.

    Args:
        series: vectors of one length.
        marked: rows of interest; of too many, evenly spread ones.
        buckets: into how many stretches of equal length the rows are cut.
    """
    count = len(series[0]) if series else 0
    if count <= 2 * buckets:
        return np.arange(count)
    edges = np.linspace(0, count, buckets + 1).astype(np.int64)
    chosen = [edges[:-1], np.array([count - 1])]
    for values in series:
        chosen += _extremes(np.asarray(values, dtype=np.float64), edges)
    for row in marked[np.linspace(0, len(marked) - 1, min(len(marked), MARKS)).astype(int)]:
        chosen.append(np.arange(max(0, row - NEIGHBOURS), min(count, row + NEIGHBOURS + 1)))
    return np.unique(np.concatenate(chosen))


def _extremes(values: NDArray[np.float64], edges: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    finite = np.isfinite(values)
    found = []
    for reduce, filler in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        filled = np.where(finite, values, filler)
        best = reduce.reduceat(filled, edges[:-1])
        is_best = filled == np.repeat(best, np.diff(edges))
        found.append(_first_in_each(is_best, edges))
    return [*found, _first_in_each(~finite, edges)]


def _first_in_each(flags: NDArray[np.bool_], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first true row of every bucket that has one."""
    rows = np.flatnonzero(flags)
    _, first = np.unique(np.searchsorted(edges, rows, side="right"), return_index=True)
    chosen: NDArray[np.int64] = rows[first]
    return chosen


def medians(values: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return medians of stretches of all values, at the kept rows nearest to their middles.

    Of few values the running median at every kept row.
    """
    if len(values) < SHORT:
        return _running(values, rows)
    result = np.full(len(rows), np.nan)
    for part in np.array_split(np.arange(len(values)), min(MEDIANS, len(values) // WINDOW)):
        finite = values[part][np.isfinite(values[part])]
        if len(finite):
            place = np.searchsorted(rows, part[len(part) // 2])
            result[min(int(place), len(rows) - 1)] = np.median(finite)
    return result


def _running(values: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    reach = max(WINDOW, len(values) // 60)
    result = np.full(len(rows), np.nan)
    for place, row in enumerate(rows):
        part = values[max(0, row - reach) : row + reach + 1]
        if np.isfinite(values[row]):
            result[place] = np.median(part[np.isfinite(part)])
    return result
