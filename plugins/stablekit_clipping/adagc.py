"""Clipping every tensor against a running average of its own gradient norm.

Wang et al.: AdaGC: Improving Training Stability for Large Language Model Pretraining
(arXiv 2502.11034).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import choice, fraction, number, whole
from stablekit.gradients import clip_factor
from stablekit.statistics import NamedValues

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["AdaGC", "adagc_average"]


def adagc_average(gamma: Tensor, norms: Tensor, limits: Tensor, *, beta: float) -> Tensor:
    """Return the running averages after a step: ``beta * gamma + (1 - beta) * min(norm, limit)``.

    Args:
        gamma: averages before, ``[P]``, infinite for a tensor not seen yet: it starts at its norm.
        norms: gradient norms before clipping, ``[P]``.
        limits: what they were clipped to, ``[P]``.
        beta: weight of the past.

    Example:
        >>> adagc_average(torch.tensor([1.0]), torch.tensor([9.0]), torch.tensor([2.0]), beta=0.5)
        tensor([1.5000])
    """
    entered = torch.minimum(norms, limits)
    return torch.where(gamma.isinf(), entered, beta * gamma + (1 - beta) * entered)


@final
class AdaGC:
    """Clip each tensor at ``lambda_rel`` times the running average of its own norm.

    Warm-up: all gradients are scaled by ``min(1, lambda_abs / n)``, n the global norm, and every
    ``gamma_i`` follows the smallest norm of its tensor. After it:
    ``h_i = min(1, lambda_rel * gamma_i / n_i)``,
    ``gamma_i = beta * gamma_i + (1 - beta) * min(n_i, lambda_rel * gamma_i)``.

    ``warmup_norms="raw"`` is the authors' code (Paddle PR 79041): the smallest norm *before*
    clipping, for ``warmup_steps + 1`` steps. ``"clipped"`` is the paper's algorithm: the smallest
    norm after the global clip, for ``warmup_steps - 1`` steps; there one spike in any tensor lowers
    the averages of all others.

    Where it differs from both: a norm that is not finite never enters an average; a tensor whose
    gradient is zero in the warm-up is not frozen for the rest of the run (there ``gamma = 0`` is
    absorbing), and a run of zero gradients lowers an average once; a tensor that appears late
    starts with its first norm. Averages start at a minimum and grow by at most
    ``(1 - beta) * (lambda_rel - 1)`` a step, so expect half of the steps to clip something.

    Args:
        lambda_rel: threshold relative to the average, above 1.
        beta: weight of the past, between 0 and 1.
        lambda_abs: global threshold during the warm-up, above 0.
        warmup_steps: length of the warm-up in updates.
        warmup_norms: "raw" or "clipped".
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> plugin = AdaGC(warmup_steps=1)
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), plugin)
        >>> for g in (0.5, 0.5, 5.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> round(stablekit.session(optimizer).metrics()["grad_norm_clipped"], 4)
        0.52
    """

    cost = "one read of the gradients; one write of the tensors that are clipped"

    def __init__(
        self,
        lambda_rel: float = 1.04,
        *,
        beta: float = 0.99,
        lambda_abs: float = 1.0,
        warmup_steps: int = 100,
        warmup_norms: str = "raw",
        name: str | None = None,
    ) -> None:
        """Check the arguments and start without averages."""
        self.lambda_rel = number("lambda_rel", lambda_rel, above=1)
        self.beta = fraction("beta", beta)
        self.lambda_abs = number("lambda_abs", lambda_abs, above=0)
        self.warmup_steps = whole("warmup_steps", warmup_steps)
        self.warmup_norms = choice("warmup_norms", warmup_norms, ("raw", "clipped"))
        self.name = name or "adagc"
        self._warm = self.warmup_steps + (1 if warmup_norms == "raw" else -1)
        self._eps = 1e-8 if warmup_norms == "raw" else 0.0
        self._steps = torch.zeros((), dtype=torch.int64)
        self._gamma = NamedValues(default=math.inf)
        self._idle = NamedValues(default=0.0)
        self._used = (torch.ones((), dtype=torch.bool), torch.zeros(0))

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip globally in the warm-up, each tensor by itself after it."""
        gradients = step.gradients
        norms, total = gradients.norms(), gradients.norm()
        gamma = self._gamma.align(gradients.names, norms.device)
        if step.evaluation == 0:
            self._steps = self._steps.to(norms.device)
            self._used = self._steps < self._warm, self.lambda_rel * gamma
        is_warm, limits = self._used
        shared = clip_factor(total, self.lambda_abs, eps=self._eps)
        own = torch.where(norms > limits, clip_factor(norms, limits, eps=self._eps), 1.0)
        factors = torch.where(is_warm, shared, torch.where(norms.isposinf(), 0.0, own))
        if step.evaluation == 0:
            self._learn(step, gamma, norms, shared)
        gradients.scale_(factors)
        seen = torch.where(limits.isfinite(), limits, norms)
        threshold = torch.where(is_warm, self.lambda_abs, torch.linalg.vector_norm(seen))
        step.record("threshold", threshold)
        step.record("factor", factors.min() if factors.numel() else 1.0)
        step.record("clipped", (factors < 1).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, and how far the warm-up is."""
        return {
            "steps": int(self._steps),
            "gamma": self._gamma.state_dict(),
            "idle": self._idle.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved averages.

        Raises:
            TypeError: The step count is not an integer.
            ValueError: An average is not a number.
        """
        self._steps = torch.tensor(whole("steps", state["steps"]))
        self._gamma.load_state_dict(state["gamma"])
        self._idle.load_state_dict(state["idle"])

    def _learn(self, step: Step, gamma: Tensor, norms: Tensor, shared: Tensor) -> None:
        is_warm, limits = self._used
        idle = self._idle.align(step.gradients.names, norms.device)
        counts = step.learning & step.gradients.present & norms.isfinite()
        is_zero = norms == 0
        smallest = torch.minimum(gamma, norms if self.warmup_norms == "raw" else norms * shared)
        average = adagc_average(gamma, norms, limits, beta=self.beta)
        tells = counts & torch.where(is_warm | gamma.isinf(), ~is_zero, ~is_zero | (idle == 0))
        self._gamma.set(torch.where(tells, torch.where(is_warm, smallest, average), gamma))
        self._idle.set(torch.where(counts, is_zero.float(), idle))
        self._steps = self._steps + step.learning
