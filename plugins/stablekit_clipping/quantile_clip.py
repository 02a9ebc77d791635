"""Clipping by a quantile of recent gradient norms, globally or for each tensor.

After the algorithm of the PyPI package ``autoclip`` 0.2.1 (``QuantileClip``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import flag, fraction, plugin_name, whole
from stablekit.gradients import clip_factor
from stablekit.statistics import LONGEST, WindowQuantile
from stablekit_clipping._report import report_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["QuantileClip"]

_ROW = ("all",)


@final
class QuantileClip:
    """Clip at a quantile of the last norms, the current one not included.

    ``C_t = quantile(n_{t-h} ... n_{t-1}, q)``; ``c = min(1, C_t / (n_t + 1e-6))``; the first step
    has no threshold. The norm enters the history as it was before clipping.

    ``QuantileClip(0.05, per_tensor=True, history=100)`` is where users of bitsandbytes'
    ``percentile_clipping=5`` (removed in 0.50) can go: 100 past norms of each tensor, here for any
    optimizer, in bf16 too, interpolated between them, and without the current value.

    Where it differs from the reference: norms that are not finite never enter the history (there,
    one NaN makes the gradients NaN for ``history`` steps); a quantile that would rest on zero norms
    is taken over the positive ones; a tensor without gradient keeps its history as it is.

    Args:
        quantile: from 0 to 1.
        history: how many past norms count.
        per_tensor: give every tensor its own history and threshold; the metric ``threshold`` is
            then the L2 norm of them.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), QuantileClip(0.5))
        >>> for g in (1.0, 3.0, 9.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> stablekit.session(optimizer).metrics()["quantile-clip/threshold"]
        2.0
    """

    cost = "one read of the gradients; one write in steps that clip; a sort of the history a step"

    def __init__(
        self,
        quantile: float = 0.9,
        *,
        history: int = 1000,
        per_tensor: bool = False,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start with empty histories."""
        self.quantile = fraction("quantile", quantile, closed=True)
        self.history = whole("history", history, at_least=1, at_most=LONGEST)
        self.per_tensor = flag("per_tensor", per_tensor)
        self.name = plugin_name(name, "quantile-clip")
        self._window = WindowQuantile(self.quantile, history=self.history)
        self._thresholds = torch.zeros(0)

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip at the quantile of the history, then take the norms into it."""
        gradients = step.gradients
        rows: tuple[str, ...] = _ROW
        norms, present = gradients.norm().view(1), step.learning
        if self.per_tensor:
            rows, norms, present = gradients.names, gradients.norms(), gradients.present
        if step.evaluation == 0:
            self._thresholds = self._window.value(rows, norms.device)
            self._window.push(rows, norms, when=self._counts(step, norms, present))
        factors = clip_factor(norms, self._thresholds)
        gradients.scale_(factors if self.per_tensor else factors[0])
        step.record("threshold", torch.linalg.vector_norm(self._thresholds))
        report_factors(step, factors)

    def state_dict(self) -> dict[str, Any]:
        """Return the histories, oldest first, by parameter name (``"all"`` for the global one)."""
        return {"histories": self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved histories.

        Raises:
            TypeError: The histories do not map names to tensors.
            ValueError: A history is not a vector of finite norms.
        """
        self._window.load_state_dict(state["histories"], field="histories")

    def _counts(self, step: Step, norms: Tensor, present: Tensor) -> Tensor:
        return step.learning & norms.isfinite() & present.to(norms.device)
