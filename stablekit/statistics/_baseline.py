"""What is usual in a stream of numbers, learned from everything but its outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.arguments import choice, number, whole
from stablekit.scalars import like
from stablekit.statistics import _baseline_floats, _baseline_tensors
from stablekit.statistics._baseline_rule import Past, Rule, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit.scalars import Flag, Scalar

__all__ = ["RobustBaseline", "Verdict"]

_LARGEST = torch.finfo(torch.float32).max
_SIGNS = {"level": None, "spread": 0.0, "last": None, "highest": 0.0}


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
        is_log = choice("scale", scale, ("linear", "log")) == "log"
        self._rule = Rule(threshold, warmup, patience, is_log)
        self._past = Past()

    def judge(self, value: Scalar) -> Verdict:
        """Compare a value with what is usual; nothing is learned.

        Args:
            value: a float, or a tensor of any shape: then every element is a stream of its own.
        """
        if isinstance(value, Tensor):
            self._past = Past(*(like(held, value) for held in self._past))
            return _baseline_tensors.judge(self._rule, self._past, value)
        if isinstance(self._past.level, Tensor):
            self._past = Past(*(like(held, value) for held in self._past))
        return _baseline_floats.judge(self._rule, self._past, value)

    def learn(self, verdict: Verdict, *, when: Flag) -> Flag:
        """Learn from a value just judged, where ``when`` is true; tell if the level was given up.

        Args:
            verdict: what :meth:`judge` returned for it.
            when: whether the step counts.
        """
        gave_up: Flag = False
        if isinstance(verdict.is_known, Tensor):
            counts = verdict.is_known & when
            self._past, gave_up = _baseline_tensors.learn(self._rule, self._past, verdict, counts)
        elif when and verdict.is_known:
            self._past, gave_up = _baseline_floats.learn(self._rule, self._past, verdict)
        return gave_up

    def state_dict(self) -> dict[str, Any]:
        """Return counts, level, spread, the latest value and the highest level, as numbers."""
        held = {field: float(value) for field, value in self._past._asdict().items()}
        return {**held, "seen": int(self._past.seen), "strain": int(self._past.strain)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved numbers.

        Raises:
            TypeError: A field is not a number.
            ValueError: A field is not finite, or is negative where it cannot be.
        """
        counts = {field: whole(field, state[field]) for field in ("seen", "strain")}
        held = {field: number(field, state[field], at_least=low) for field, low in _SIGNS.items()}
        if any(abs(value) > _LARGEST for value in held.values()):
            raise ValueError(f"{', '.join(held)} must be float32 numbers, got {held}")
        self._past = Past(**counts, **held)
