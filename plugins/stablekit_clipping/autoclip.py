"""Clipping by a percentile of all gradient norms seen so far.

Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source Separation
Networks (arXiv 2007.14469).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import fraction, plugin_name, whole
from stablekit.gradients import clip_factor
from stablekit.statistics import LONGEST, GrowingQuantile, WindowQuantile, history_of
from stablekit_clipping._report import report_factor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step
    from stablekit.scalars import Scalar

__all__ = ["AutoClip"]

_ROW = ("all",)
_FIRST_BUFFER = 1024


@final
class AutoClip:
    """Clip the global norm at a percentile of its own history, the current norm included.

    ``C_t = percentile(n_1 ... n_t, p)``; ``c = min(1, C_t / (n_t + 1e-6))``.

    With ``percentile=10`` about nine steps in ten are clipped: it normalises as much as it guards.
    There is no warm-up: the first threshold is the first norm. In a run that explodes from the
    start that learns from the explosion; put ``"global-norm"`` before it there.

    Where it differs from the authors' code (pseeth/autoclip), which is broken on bad input: norms
    that are not finite never enter the history; a percentile that would rest on zero norms is taken
    over the positive ones; the history is saved with the optimizer and a resumed run goes on with
    it; the norm is global under FSDP2.

    Args:
        percentile: from 0 to 100; the paper recommends 10.
        history: keep only so many norms; None keeps all, exactly, at O(log n) a step.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), AutoClip(50))
        >>> for g in (1.0, 1.0, 5.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> round(stablekit.session(optimizer).metrics()["autoclip/threshold"], 3)
        1.0
    """

    cost = "one read of the gradients; one write in steps that clip; 40 bytes a step of history"

    def __init__(
        self, percentile: float = 10.0, *, history: int | None = None, name: str | None = None
    ) -> None:
        """Check the arguments and start with an empty history."""
        self.percentile = fraction("percentile", percentile, closed=True, scale=100.0)
        self.history = history
        if history is not None:
            self.history = whole("history", history, at_least=1, at_most=LONGEST)
        self.name = plugin_name(name, "autoclip")
        self._quantile = self.percentile / 100.0
        self._window = WindowQuantile(self._quantile, history=self.history or _FIRST_BUFFER)
        self._all = GrowingQuantile(self._quantile)
        self._on_host = self.history is None
        self._pushed = 0
        self._threshold: Scalar = math.inf

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Keep an unbounded history in heaps on the host, in a growing buffer elsewhere."""
        on_host = self.history is None and session.host
        if on_host != self._on_host:
            state = self.state_dict()
            self._on_host = on_host
            self.load_state_dict(state)

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Take the norm into the history, then clip at its percentile."""
        norm = step.gradients.norm()
        if step.evaluation == 0:
            self._learn(step, norm)
        factor = clip_factor(step.scalar(norm), self._threshold)
        step.gradients.scale_(factor)
        step.record("threshold", self._threshold)
        report_factor(step, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as one vector, oldest first."""
        if self._on_host:
            return {"history": self._all.values()}
        return {"history": self._window.state_dict().get(_ROW[0], torch.zeros(0))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved history.

        Raises:
            TypeError: It is not a tensor.
            ValueError: It is not a vector of finite norms.
        """
        values = history_of("history", state["history"])
        self._pushed = values.numel()
        if self._on_host:
            self._all.load(values)
            return
        if self.history is None and values.numel() > self._window.history:
            self._window = WindowQuantile(self._quantile, history=2 * values.numel())
        self._window.load_state_dict({_ROW[0]: values}, field="history")

    def _learn(self, step: Step, norm: Tensor) -> None:
        when = step.learning & norm.isfinite()
        if self._on_host:
            if bool(when):
                self._all.push(norm.item())
            self._threshold = self._all.value()
            return
        if self.history is None and self._pushed >= self._window.history:
            self._window.grow(2 * self._window.history)
        self._pushed += 1
        self._window.push(_ROW, norm.view(1), when=when)
        self._threshold = step.scalar(self._window.value(_ROW, norm.device)[0])
