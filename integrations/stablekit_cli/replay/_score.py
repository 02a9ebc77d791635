"""Figures of a replay: how much a chain clips, and which of the known spikes it met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stablekit_cli.replay._play import Outcome
    from stablekit_monitors.run_log import RunLog

__all__ = ["Score", "clipped_in", "factors_of", "score", "thresholds_of"]


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    label: str
    threshold_median: float | None
    threshold_last: float | None
    clipped: int
    """Rows in which it clips anything."""
    share: float
    factor: float | None
    """Mean of norm after / norm before over those rows."""
    skipped: int
    caught: tuple[int, ...]
    """Steps of known spikes that it clips; of those that are not finite, that it skips."""
    missed: tuple[int, ...]
    not_finite: tuple[int, ...]
    """Those of the caught and missed steps whose gradients are not finite."""
    factor_at_spikes: float | None
    """Mean of norm after / norm before over the known finite spikes; 0 where skipped."""
    stopped: str


def score(run: RunLog, outcome: Outcome, spikes: Sequence[int]) -> Score:
    """Return the figures of one chain."""
    clipped, factors = clipped_in(outcome), factors_of(outcome)
    thresholds = thresholds_of(outcome)
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(run.norms), axis=1)
    known = thresholds[np.isfinite(thresholds)]
    rows = [int(row) for row in np.flatnonzero(np.isin(run.steps, [*spikes]))]
    spiky = [row for row in rows if finite[row]]
    # Clipping does not make a gradient finite: of those that are not, only a skip rids the run.
    met = {row for row in rows if outcome.skipped[row] or (clipped[row] and finite[row])}
    return Score(
        label=outcome.chain.label,
        threshold_median=float(np.median(known)) if known.size else None,
        threshold_last=float(known[-1]) if known.size else None,
        clipped=int(clipped.sum()),
        share=float(clipped.sum() / max(outcome.played, 1)),
        factor=float(factors[clipped].mean()) if clipped.any() else None,
        skipped=int(outcome.skipped.sum()),
        caught=tuple(int(run.steps[row]) for row in rows if row in met),
        missed=tuple(int(run.steps[row]) for row in rows if row not in met),
        not_finite=tuple(int(run.steps[row]) for row in rows if not finite[row]),
        factor_at_spikes=float(factors[spiky].mean()) if spiky else None,
        stopped=outcome.stopped,
    )


def clipped_in(outcome: Outcome) -> NDArray[np.bool_]:
    """Return in which rows any plugin clipped anything."""
    shares = [values for key, values in outcome.metrics.items() if key.endswith("/clipped")]
    acted = np.zeros(len(outcome.skipped), dtype=bool)
    for values in shares:
        acted |= np.nan_to_num(values) > 0
    return acted & ~outcome.skipped


def factors_of(outcome: Outcome) -> NDArray[np.float64]:
    """Return norm after / norm before of each row: 1 where nothing changed, 0 where skipped."""
    count = len(outcome.skipped)
    before = outcome.metrics.get("grad_norm", np.ones(count))
    after = outcome.metrics.get("grad_norm_clipped", before)
    usual = np.isfinite(before) & np.isfinite(after) & (before > 0)
    factors = np.divide(after, before, out=np.ones(count), where=usual)
    factors[np.isposinf(before) & (after == 0)] = 0.0
    factors[outcome.skipped] = 0.0
    return factors


def thresholds_of(outcome: Outcome) -> NDArray[np.float64]:
    """Return the smallest threshold of each row, NaN where there is none."""
    listed = [values for key, values in outcome.metrics.items() if key.endswith("/threshold")]
    smallest = np.full(len(outcome.skipped), np.nan)
    for values in listed:
        smallest = np.fmin(smallest, np.where(np.isfinite(values), values, np.nan))
    return smallest
