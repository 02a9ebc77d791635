"""What is usual in a stream of numbers, learned from everything but its outliers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from stablekit.arguments import number, whole
from stablekit.scalars import invert, is_finite, like, ratio, where

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit.scalars import Flag, Scalar

_RISE, _FALL, _SPREAD = 0.05, 0.2, 0.01
_NOISE = {"linear": 0.01, "log": 0.05}
_DEPTH = 0.1
_DOUBT = 10.0
_GAUSSIAN = math.sqrt(math.pi / 2)
_TINY = 1e-30
_LARGEST = torch.finfo(torch.float32).max


class Verdict(NamedTuple):
    """What a baseline says of a value, before it has learned from it."""

    value: Scalar
    """The value itself."""
    score: Scalar
    """How many standard deviations above the level; 0 in the warm-up. Of a value that is not finite
    it is infinite, or 0 on the scale "log"."""
    baseline: Scalar
    """The level, in the units of the value."""
    limit: Scalar
    """The value above which the score exceeds the threshold; infinite in the warm-up."""
    position: Scalar
    """The value on the baseline's scale: itself, or its logarithm."""
    level: Scalar
    """The level on that scale."""
    margin: Scalar
    """The distance at which the score is the threshold."""


class _Past(NamedTuple):
    """What is kept of all values."""

    seen: Scalar
    level: Scalar
    spread: Scalar
    last: Scalar
    highest: Scalar


@final
class RobustBaseline:
    """The level and the spread of a stream, which outliers do not move.

    With ``x`` a value (``scale="log"``: its logarithm), ``d = x - level`` and
    ``score = d / (1.2533 * max(spread * (1 + 10 / (n + 1)), noise))``, where n is how many values
    are known, few of which say little, and 1.2533 turns a mean deviation into a standard one:

    * A value whose score exceeds ``threshold`` is an outlier, and changes nothing but a count.
    * Any other moves the level, by 0.05 d if it is above and by 0.2 d if it is below, so that a
      falling loss is followed closely; and the spread, by 0.01 of the way to its own deviation. A
      value below the level deviates by no more than it differs from the value before it, so that a
      steady fall does not look like noise. What is far below counts as far as the threshold only.
    * ``noise`` is 0.01 of the level, or 0.001 of the highest level so far where that is more; on
      the scale "log" it is 0.05. A constant stream neither divides by zero nor alarms on rounding.
    * Way out: where outliers, on either side, outnumber other values by ``patience``, they are what
      is usual now. The level is given up and the warm-up starts again from there.
    * In the first ``warmup`` values level and spread follow as means while these move faster, and
      what is far above counts as far as the threshold only: an early spike does not set the scale.
    * A value that is not finite, or not positive on the scale "log", changes nothing at all. On the
      scale "linear" its score is infinite, in the warm-up too.

    A stream that never rises has no outlier above, however it falls. Memory and time are the same
    at every step. The rates were chosen on the streams of ``benchmarks/detectors.py``.

    Args:
        threshold: the score above which a value is an outlier.
        warmup: how many values are learned from before there are outliers.
        patience: how many outliers more than other values make a new level.
        scale: "linear", or "log" for what is positive and varies by factors, such as norms.

    Example:
        >>> usual = RobustBaseline(threshold=6.0, warmup=4, patience=3)
        >>> for x in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        ...     verdict = usual.judge(x)
        ...     gave_up = usual.learn(verdict, when=True)
        >>> usual.judge(2.0).score > 6.0, round(usual.judge(1.0).baseline, 2)
        (True, 1.0)
    """

    def __init__(
        self, *, threshold: float, warmup: int, patience: int, scale: str = "linear"
    ) -> None:
        """Start without a value."""
        self.threshold = threshold
        self.warmup = warmup
        self.patience = patience
        self.is_log = scale == "log"
        self._noise = _NOISE[scale]
        self._strain: Scalar = 0
        self._past = _Past(0, 0.0, 0.0, 0.0, 0.0)

    def judge(self, value: Scalar) -> Verdict:
        """Compare a value with what is usual; nothing changes."""
        self._align(value)
        past = self._past
        position = _log(value) if self.is_log else value
        level = where(past.seen > 0, past.level, position)
        deviation = position - level
        doubt = 1.0 + _DOUBT / (past.seen + 1)
        spread = _larger(past.spread * doubt, self._least_spread(level)) * _GAUSSIAN
        margin = spread * self.threshold
        is_ready = past.seen >= self.warmup
        score = where(is_ready & is_finite(deviation), ratio(deviation, spread), 0.0)
        return Verdict(
            value,
            score if self.is_log else where(is_finite(value), score, math.inf),
            self._value(level),
            where(is_ready, self._value(level + margin), math.inf),
            position,
            level,
            margin,
        )

    def learn(self, verdict: Verdict, *, when: Flag) -> Flag:
        """Learn from a value just judged, where ``when`` is true; tell if the level was given up.

        Args:
            verdict: what :meth:`judge` returned for it.
            when: whether the step counts.
        """
        position, score = verdict.position, verdict.score
        when = when & is_finite(position - verdict.level)
        above = score > self.threshold
        is_outlier = above | (score < -self.threshold)
        strain = where(is_outlier, self._strain + 1, self._strain - (self._strain > 0) * 1)
        gave_up = when & (strain >= self.patience)
        self._strain = where(when, where(gave_up, 0, strain), self._strain)
        self._past = _chosen(when & invert(above), self._moved(verdict), self._past)
        if gave_up is not False:
            anew = _Past(1, position, 0.0, position, _size(position))
            self._past = _chosen(gave_up, anew, self._past)
        return gave_up

    def _moved(self, verdict: Verdict) -> _Past:
        """Return the past with a value that is no outlier in it."""
        past, position, level = self._past, verdict.position, verdict.level
        lowest = where(past.seen < self.warmup, -math.inf, -verdict.margin)
        step = _larger(_smaller(position - level, verdict.margin), lowest)
        is_up = step > 0
        own = where(is_up, step, _smaller(-step, _size(position - past.last)))
        own = own * (past.seen > 1)
        least = 1.0 / (past.seen + 1.0)
        level = level + step * _larger(least, where(is_up, _RISE, _FALL))
        spread = past.spread + (own - past.spread) * _larger(least, _SPREAD)
        return _Past(past.seen + 1, level, spread, position, _larger(past.highest, _size(level)))

    def _least_spread(self, level: Scalar) -> Scalar:
        if self.is_log:
            return self._noise
        return _larger(_larger(_size(level), self._past.highest * _DEPTH) * self._noise, _TINY)

    def _value(self, position: Scalar) -> Scalar:
        return _exp(position) if self.is_log else position

    def _align(self, example: Scalar) -> None:
        """Hold the numbers as the values that come: floats, or tensors on their device."""
        if isinstance(example, Tensor) or isinstance(self._strain, Tensor):
            self._strain = like(self._strain, example)
            self._past = _Past(*(like(held, example) for held in self._past))

    def state_dict(self) -> dict[str, Any]:
        """Return counts, level, spread, the latest value and the highest level, as numbers."""
        held = {field: float(value) for field, value in self._past._asdict().items()}
        return {**held, "seen": int(self._past.seen), "strain": int(self._strain)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved numbers.

        Raises:
            TypeError: A field is not a number.
            ValueError: A field is not finite, or is negative where it cannot be.
        """
        seen, strain = whole("seen", state["seen"]), whole("strain", state["strain"])
        signs = {"level": None, "spread": 0.0, "last": None, "highest": 0.0}
        held = {field: number(field, state[field], at_least=low) for field, low in signs.items()}
        if any(abs(value) > _LARGEST for value in held.values()):
            raise ValueError(f"{', '.join(held)} must be float32 numbers, got {held}")
        self._past, self._strain = _Past(seen, **held), strain


def _chosen(condition: Flag, chosen: _Past, otherwise: _Past) -> _Past:
    if isinstance(condition, Tensor):
        return _Past(*(where(condition, *pair) for pair in zip(chosen, otherwise, strict=True)))
    return chosen if condition else otherwise


def _larger(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Tensor):
        return a.maximum(b) if isinstance(b, Tensor) else a.clamp(min=b)
    return max(a, b)


def _smaller(a: Scalar, b: Scalar) -> Scalar:
    return a.minimum(torch.as_tensor(b)) if isinstance(a, Tensor) else min(a, b)


def _size(a: Scalar) -> Scalar:
    return a.abs() if isinstance(a, Tensor) else abs(a)


def _log(a: Scalar) -> Scalar:
    if isinstance(a, Tensor):
        return a.log()
    return math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan)


def _exp(a: Scalar) -> Scalar:
    if isinstance(a, Tensor):
        return a.exp()
    return math.exp(a) if a < 700 else a * math.inf
