"""How often and how hard each plugin clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stablekit_monitors.run_log import RunLog

__all__ = ["Clipping", "clipping_of"]


@dataclass(frozen=True)
class Clipping:
    """One row of the table."""

    plugin: str
    share: float
    """Share of the recorded steps in which it clipped anything."""
    steps: int
    tensors: float | None
    """Mean share of the tensors or units clipped in those steps."""
    factor: float | None
    """Mean of the factors it applied in those steps; of several in a step the smallest."""
    smallest: float | None
    smallest_at: int | None
    median_threshold: float | None
    last_threshold: float | None


def clipping_of(run: RunLog) -> list[Clipping]:
    """Return a row for every plugin that reports clipping, in the order of the log."""
    plugins = [key.removesuffix("/clipped") for key in run.scalars if key.endswith("/clipped")]
    return [_row(run, plugin) for plugin in plugins]


def _row(run: RunLog, plugin: str) -> Clipping:
    clipped = run.scalars[f"{plugin}/clipped"]
    known = np.isfinite(clipped)
    acted = known & (clipped > 0)
    steps, stands_for = int(run.stride[acted].sum()), int(run.stride[known].sum())
    factors = run.scalars.get(f"{plugin}/factor", np.full(len(clipped), np.nan))
    factors = np.where(acted, factors, np.nan)
    smallest = _where_smallest(factors)
    thresholds = _finite(run.scalars.get(f"{plugin}/threshold", np.empty(0)))
    return Clipping(
        plugin=plugin,
        share=steps / stands_for if stands_for else 0.0,
        steps=steps,
        tensors=_mean(clipped[acted]),
        factor=_mean(factors),
        smallest=None if smallest is None else float(factors[smallest]),
        smallest_at=None if smallest is None else int(run.steps[smallest]),
        median_threshold=float(np.median(thresholds)) if thresholds.size else None,
        last_threshold=float(thresholds[-1]) if thresholds.size else None,
    )


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = _finite(values)
    return float(finite.mean()) if finite.size else None


def _where_smallest(values: NDArray[np.float64]) -> int | None:
    return int(np.nanargmin(values)) if np.isfinite(values).any() else None
