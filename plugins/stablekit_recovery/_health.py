"""Telling a run that diverges from one that has a bad batch, from numbers on the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

from stablekit.arguments import flag, number, whole
from stablekit.statistics import WindowMoments
from stablekit_recovery._values import values_of
from stablekit_recovery.skip_spikes import spike_limit

if TYPE_CHECKING:
    from collections.abc import Mapping

_MIN_STD = 0.02
_LEAST_VALUES = 16


@final
class Health:
    """How many steps in a row were bad, or good, by the loss a run had reached before.

    A step is bad if it was skipped, if its loss or norm is not finite, or if its loss is above the
    limit: :func:`spike_limit` of the lowest mean that the last good losses ever had. Only good
    losses are learned from. The lowest mean, and not the latest, because a run that drifts away
    slowly would take its mean along.
    """

    def __init__(self, *, sigma: float, window: int, patience: int, max_skips: int) -> None:
        """Start with a run in good health."""
        self.sigma = sigma
        self.patience = patience
        self.max_skips = max_skips
        self._window = WindowMoments(window)
        self._least = min(_LEAST_VALUES, window)
        self._best: tuple[float, float] | None = None
        self.bad = 0
        self.skips = 0
        self.high = 0
        self.good = 0
        self.trouble_at = 0

    @property
    def is_high_only(self) -> bool:
        """Whether nothing is wrong with the latest bad steps but the level of their loss."""
        return self.high == self.bad

    @property
    def limit(self) -> float:
        """Above which loss a step is bad; infinite before there are enough good ones."""
        if self._best is None:
            return math.inf
        return float(spike_limit(*self._best, sigma=self.sigma, min_std=_MIN_STD))

    def see(self, step: int, loss: float | None, norm: float, *, skipped: bool) -> bool:
        """Take in a step, and tell whether its loss and norm are finite."""
        is_broken = not math.isfinite(norm) or (loss is not None and not math.isfinite(loss))
        is_high = not is_broken and loss is not None and loss > self.limit
        if is_broken or is_high or skipped:
            self.trouble_at = step if self.bad == 0 else self.trouble_at
            self.bad, self.high, self.good = self.bad + 1, self.high + is_high, 0
            self.skips = self.skips + 1 if skipped else 0
            return not is_broken
        self.bad, self.high, self.skips, self.good = 0, 0, 0, self.good + 1
        if loss is not None:
            self._learn(loss)
        return True

    def verdict(self) -> str:
        """Return why this run should go back, or nothing."""
        if self.skips >= self.max_skips:
            return f"{self.skips} steps in a row were skipped"
        if self.bad >= self.patience:
            said = "" if self._best is None else f" (a loss above {self.limit:.4g} is)"
            return f"{self.bad} steps in a row were bad{said}"
        return ""

    def forget_level(self) -> None:
        """Learn anew what a good loss is."""
        self._window.clear(when=True)
        self._best = None
        self.forget_streak()

    def forget_streak(self) -> None:
        """Start counting again."""
        self.bad, self.high, self.skips, self.good = 0, 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, the best level and the counts."""
        mean, std = self._best or (0.0, 0.0)
        level = {"losses": self._window.values(), "best": mean, "best_std": std}
        counts = {"bad": self.bad, "high": self.high, "skips": self.skips, "good": self.good}
        return {**level, "has_best": self._best is not None, **counts, "trouble": self.trouble_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A field is out of range.
        """
        losses = values_of("losses", state["losses"])
        best = number("best", state["best"]), number("best_std", state["best_std"], at_least=0)
        has_best = flag("has_best", state["has_best"])
        counts = [whole(key, state[key]) for key in ("bad", "high", "skips", "good", "trouble")]
        self._window.load(losses)
        self._best = best if has_best else None
        self.bad, self.high, self.skips, self.good, self.trouble_at = counts

    def _learn(self, loss: float) -> None:
        self._window.push(loss, when=True)
        if self._window.count >= self._least:
            mean, std = self._window.moments()
            if self._best is None or mean < self._best[0]:
                self._best = float(mean), float(std)
