"""Skipping steps whose loss or gradient norm stands out from the accepted ones before.

The rule is that of OLMo-core's SkipStepOptimizer (AI2): a step is skipped if loss or norm exceed
the mean of the last ``window`` values by ``sigma`` standard deviations.
"""

from __future__ import annotations

import math
import warnings
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple, final

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name, whole
from stablekit.errors import NoEffectWarning
from stablekit.scalars import invert, is_finite, like, minimum, where
from stablekit.statistics import WindowMoments
from stablekit_recovery._values import values_of
from stablekit_recovery._words import words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from stablekit import Step
    from stablekit.scalars import Flag, Scalar

__all__ = ["SkipSpikes", "spike_limit"]

SIGNALS = ("loss", "norm")
_NAMES = {"loss": "the loss", "norm": "the gradient norm"}
_PATIENCE = 2
_PAID_BACK = 0.05
_METRICS = {"loss": "loss_threshold", "norm": "threshold"}


def spike_limit(mean: Scalar, std: Scalar, *, sigma: float, min_std: float) -> Scalar:
    """Return above which value a signal stands out.

    ``mean + sigma * max(std, min_std * abs(mean))``

    Args:
        mean: mean of the accepted values, a float or a 0-dim tensor; likewise ``std``.
        std: their standard deviation.
        sigma: how many standard deviations are too many.
        min_std: the least that counts as a standard deviation, as a share of the mean.

    Example:
        >>> spike_limit(2.0, 0.5, sigma=6.0, min_std=0.01)
        5.0
        >>> spike_limit(2.0, 0.0, sigma=6.0, min_std=0.01)  # of a constant stream
        2.12
    """
    least = where(mean < 0, -mean, mean) * min_std
    return mean + where(std < least, least, std) * sigma


class _Judged(NamedTuple):
    """A signal in one step: whether it stands out, or is not finite."""

    name: str
    value: Scalar
    limit: Scalar
    is_out: Flag
    is_bad: Flag


class _Taken(NamedTuple):
    """What is to become of a signal's window if nobody skips the step."""

    name: str
    value: Scalar
    enters: Flag
    shifts: Flag


@final
class SkipSpikes:
    """Skip a step whose loss or gradient norm is a spike, at most so many in a row.

    A spike is a value above :func:`spike_limit` of the last ``window`` values of accepted steps, or
    one that is not finite. Skipped values never enter the window, so that a spike does not hide the
    next one, and a NaN does not lock out what follows. After ``max_consecutive`` skips in a row the
    level is taken to have shifted, and likewise when more than one step in twenty is skipped until
    twice ``max_consecutive`` are in excess, so that a second source of data is not left out for
    ever: the step is taken, the event "level-shift" says so, and the window starts again from
    there. A step whose gradients are not finite is never taken; list
    ``nonfinite-guard`` too, which limits how many of these may follow one another. In the first
    ``warmup_steps``, and after a shift, only what is not finite is skipped.

    Where it differs from OLMo-core's SkipStepOptimizer: there skipped values enter the window, one
    NaN makes it skip every step until it has left the window, NaN gradients reach the weights of a
    skipped step, skips are not limited, and the window is not in the checkpoint.

    The loss is judged if it is known: ``session.observe(loss=...)``, a closure, or a model whose
    outputs have a ``.loss``. It is the mean over data-parallel ranks, and the norm is that of all
    shards, so all ranks decide alike.

    Args:
        sigma: how many standard deviations above the mean are a spike, above 0.
        window: how many accepted values make mean and deviation, at least 2.
        max_consecutive: how many steps in a row may be skipped, at least 1.
        warmup_steps: how many values must be in the window, 2 to ``window``.
        min_std: the least that counts as a standard deviation, as a share of the mean: a steady
            stream has none.
        signals: "loss", "norm" or both; also as "loss+norm".
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> plugin = SkipSpikes(window=8, warmup_steps=4)
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), plugin)
        >>> for g in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> p.data, stablekit.session(optimizer).skipped
        (tensor([-5.]), 1)
    """

    cost = "no read beyond the norms; the loss of all ranks; with a fused optimizer no host read"

    def __init__(
        self,
        sigma: float = 6.0,
        *,
        window: int = 128,
        max_consecutive: int = 5,
        warmup_steps: int = 32,
        min_std: float = 0.01,
        signals: str | Iterable[str] = SIGNALS,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start with empty windows."""
        self.sigma = number("sigma", sigma, above=0)
        self.window = whole("window", window, at_least=2)
        self.max_consecutive = whole("max_consecutive", max_consecutive, at_least=1)
        self.warmup_steps = whole("warmup_steps", warmup_steps, at_least=2, at_most=self.window)
        self.min_std = number("min_std", min_std, at_least=0)
        self.signals = words("signals", signals, SIGNALS)
        self.name = plugin_name(name, "skip-spikes")
        self._windows = {signal: WindowMoments(self.window) for signal in SIGNALS}
        self._in_a_row: Scalar = 0
        self._debt: Scalar = 0.0
        self._total: Scalar = 0
        self._taken: list[_Taken] = []
        self._has_warned = False

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Skip a spike."""
        norm, ok = step.scalar(step.gradients.raw_norm()), step.flag(step.ok)
        self._in_a_row, self._total = like(self._in_a_row, norm), like(self._total, norm)
        self._debt = like(self._debt, norm)
        judged = [self._judge(step, name, value) for name, value in self._read(step)]
        is_broken = invert(is_finite(norm)) & ok
        is_spike = _any(judged) & ok & invert(is_broken)
        may_skip = (self._in_a_row < self.max_consecutive) & (
            self._debt < _PATIENCE * self.max_consecutive
        )
        skips = is_broken | (is_spike & may_skip)
        step.skip("the gradients are not finite", when=is_broken)
        _ask(step, judged, skips & invert(is_broken))
        learning = step.flag(step.learning) & invert(skips)
        self._taken = [self._take(step, one, is_spike & invert(skips), learning) for one in judged]
        row = where(is_spike, minimum(self._in_a_row + 1, self.max_consecutive), 0)
        self._in_a_row = where(ok & invert(is_broken), row, self._in_a_row)
        paid = where(self._debt > _PAID_BACK, self._debt - _PAID_BACK, 0.0)
        owed = where(is_spike, where(skips, self._debt + 1.0, 0.0), paid)
        self._debt = where(ok & invert(is_broken), owed, self._debt)
        self._total = self._total + skips
        step.record("skipped", self._total)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Let the values of a step into the window that nobody skipped."""
        ok = step.flag(step.ok)
        for name, value, enters, shifts in self._taken:
            self._windows[name].clear(when=shifts & ok)
            self._windows[name].push(value, when=enters & ok)
        self._taken = []

    def state_dict(self) -> dict[str, Any]:
        """Return the windows, and how many steps were skipped, in a row and in all."""
        windows = {name: window.values() for name, window in self._windows.items()}
        counts = {"in_a_row": int(self._in_a_row), "total": int(self._total)}
        return {**windows, **counts, "debt": float(self._debt)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved windows.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A field holds a number that is not finite, or is negative.
        """
        windows = {name: values_of(name, state[name]) for name in SIGNALS}
        in_a_row, total = whole("in_a_row", state["in_a_row"]), whole("total", state["total"])
        debt = number("debt", state["debt"], at_least=0)
        for name, values in windows.items():
            self._windows[name].load(values)
        self._in_a_row, self._total, self._debt, self._taken = in_a_row, total, debt, []

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Continue with the windows of a snapshot; how many steps were skipped is still true."""
        self.load_state_dict({**state, "total": int(self._total)})

    def _read(self, step: Step) -> list[tuple[str, Scalar]]:
        found: dict[str, Tensor | None] = {
            name: step.loss if name == "loss" else step.gradients.raw_norm()
            for name in self.signals
        }
        if found == {"loss": None} and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.name} judges the loss alone, but none was observed: call"
                " session.observe(loss=...) before step()",
                NoEffectWarning,
                stacklevel=2,
            )
        home = step.gradients.device
        return [(n, step.scalar(value.to(home))) for n, value in found.items() if value is not None]

    def _judge(self, step: Step, name: str, value: Scalar) -> _Judged:
        window = self._windows[name]
        window.align(value)
        mean, std = window.moments()
        limit = spike_limit(mean, std, sigma=self.sigma, min_std=self.min_std)
        # Zeros alone have no scale to stand out from.
        is_judged = (window.count >= self.warmup_steps) & (limit > mean)
        step.record(_METRICS[name], where(is_judged, limit, math.inf))
        has_value = is_finite(value)
        is_out = is_judged & (value > limit) & has_value
        return _Judged(name, value, limit, is_out, invert(has_value))

    def _take(self, step: Step, one: _Judged, is_over: Flag, learning: Flag) -> _Taken:
        """Say what a step that is taken does to a window; ``is_over``: although it is a spike."""
        shifts = one.is_out & is_over
        step.emit("level-shift", self._message(one.name), when=shifts)
        return _Taken(one.name, one.value, learning & invert(one.is_bad), shifts)

    def _message(self, name: str) -> str:
        return (
            f"{_NAMES[name]} stands out after {self.max_consecutive} skipped steps: the step is"
            " taken, and the new level accepted"
        )


def _ask(step: Step, judged: list[_Judged], skips: Flag) -> None:
    """Ask once for the skip, whichever of the signals are its cause.

    What they are may be known on the device only, where no message can be put together.
    """
    for some in range(1, len(judged) + 1):
        for causes in combinations(judged, some):
            names, is_so = {one.name for one in causes}, skips
            for one in judged:
                is_cause = one.is_out | one.is_bad
                is_so = is_so & (is_cause if one.name in names else invert(is_cause))
            step.skip("; ".join(map(_reason, causes)), when=is_so)


def _reason(one: _Judged) -> str:
    """Say why a step is skipped, with numbers where they are on the host."""
    said = f"{_NAMES[one.name]} stands out"
    if isinstance(one.value, float) and isinstance(one.limit, float):
        return f"{said}: {one.value:.4g}, the limit is {one.limit:.4g}"
    return said


def _any(judged: list[_Judged]) -> Flag:
    found: Flag = False
    for one in judged:
        found = found | one.is_out | one.is_bad
    return found
