"""How a run ended: well, lost, or in steps that never were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stablekit_cli.report._text import number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stablekit_monitors.run_log import RunLog

__all__ = ["bad_tail", "ending"]


def ending(run: RunLog) -> tuple[bool, list[str]]:
    """Return whether the run is lost, and sentences on its end."""
    lost, tail = _lost(run), bad_tail(run)
    if lost:
        return True, [*_later(run), lost]
    if tail:
        were = "step was" if tail == 1 else f"{tail:,} steps were"
        stop = f"The last {were} skipped or not finite; the run may have stopped there."
        return tail > 1, [stop, *_later(run)]
    return False, [*_later(run), *_loss(run)]


def bad_tail(run: RunLog) -> int:
    """Return how many rows at the end were skipped or not finite, without a good one between."""
    good = np.flatnonzero(run.ok & _is_finite(run))
    return len(run) - int(good[-1]) - 1 if good.size else len(run)


def _is_finite(run: RunLog) -> NDArray[np.bool_]:
    """Tell which rows are finite. A loss of NaN alone is one that was not recorded."""
    finite: NDArray[np.bool_] = ~np.isinf(run.scalars.get("loss", np.zeros(len(run))))
    if run.norms.size:
        return finite & (np.isfinite(run.norms) | ~run.present).all(axis=1)
    return finite & np.isfinite(run.scalars.get("grad_norm", np.zeros(len(run))))


def _lost(run: RunLog) -> str:
    """Say so where the last recorded norm is not finite and the step was not skipped."""
    norms = run.scalars.get("grad_norm", np.empty(0))
    if not norms.size or np.isfinite(norms[-1]) or not run.ok[-1]:
        return ""
    if not len(run.norms) or np.isfinite(run.norms[-1]).all():
        return ""
    return f"The run ended with a gradient norm of {norms[-1]:g}."


def _later(run: RunLog) -> list[str]:
    """Say so where events tell of steps after the last recorded one."""
    last = max((event.step for event in run.events), default=0)
    if last <= run.steps[-1]:
        return []
    kinds = dict.fromkeys(event.kind for event in run.events if event.step == last)
    where = f"The recorded steps end at {int(run.steps[-1]):,}, the events go on to step {last:,}"
    return [f"{where}: {', '.join(kinds)}."]


def _loss(run: RunLog) -> list[str]:
    losses = run.scalars.get("loss", np.empty(0))
    finite = losses[np.isfinite(losses)]
    if len(finite) < 2:
        return []
    window = max(1, len(finite) // 50)
    start, end = float(np.median(finite[:window])), float(np.median(finite[-window:]))
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return [f"The loss {verb} from {number(start)} to {number(end)}."]
