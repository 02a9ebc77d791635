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
from stablekit.arguments import choice, fraction, number, plugin_name, whole
from stablekit.gradients import clip_factor
from stablekit.scalars import is_finite, like, where
from stablekit.statistics import NamedValues
from stablekit_clipping._report import report_factor, report_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step
    from stablekit.scalars import Flag, Scalar

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

    Where it differs from both: a step whose global norm is not finite teaches nothing; a tensor
    whose gradient is zero in the warm-up is not frozen for the rest of the run (there
    ``gamma = 0`` is absorbing), and zero gradients after it never take an average below half of
    what it would be without them (there a tensor used in every other step dies out); a tensor
    that appears late starts with its first norm that is not zero. Averages start at a minimum and
    grow by at most ``(1 - beta) * (lambda_rel - 1)`` a step, so expect half of the steps to clip
    something. The metric ``threshold`` is the L2 norm of the tensors' thresholds.

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
        >>> import torch, stablekit
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
        self.name = plugin_name(name, "adagc")
        self._warm = self.warmup_steps + (1 if warmup_norms == "raw" else -1)
        self._eps = 1e-8 if warmup_norms == "raw" else 0.0
        self._steps: Scalar = 0
        self._gamma = NamedValues(default=math.inf)
        self._active = NamedValues(default=math.inf)
        self._used: tuple[Flag, Tensor] = (True, torch.zeros(0))

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip globally in the warm-up, each tensor by itself after it."""
        gradients = step.gradients
        norms, total = gradients.norms(), step.scalar(gradients.norm())
        gamma = self._gamma.align(gradients.names, norms.device)
        if step.evaluation == 0:
            self._steps = like(self._steps, total)
            self._used = self._steps < self._warm, self.lambda_rel * gamma
        is_warm, limits = self._used
        shared = clip_factor(total, self.lambda_abs, eps=self._eps)
        own = torch.where(norms > limits, clip_factor(norms, limits, eps=self._eps), 1.0)
        factors = where(is_warm, shared, torch.where(norms == math.inf, 0.0, own))
        if step.evaluation == 0:
            counts = step.flag(step.learning) & is_finite(total)
            self._learn(step, gamma, norms, shared, counts)
        gradients.scale_(factors)
        seen = torch.where(limits < math.inf, limits, norms)
        threshold = where(is_warm, self.lambda_abs, torch.linalg.vector_norm(seen))
        step.record("threshold", threshold)
        if isinstance(factors, Tensor):
            report_factors(step, factors)
        else:
            report_factor(step, factors)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, with and without zeros, and the steps taken."""
        return {
            "steps": int(self._steps),
            "gamma": self._gamma.state_dict(),
            "active": self._active.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved averages.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A number is not finite, or is negative.
        """
        steps = whole("steps", state["steps"])
        for average, key in ((self._gamma, "gamma"), (self._active, "active")):
            average.load_state_dict(state[key], field=key)
        if odd := sorted(set(state["gamma"]) ^ set(state["active"])):
            raise ValueError(f"gamma and active must hold the same names, not so {', '.join(odd)}")
        self._steps = steps

    def _learn(
        self, step: Step, gamma: Tensor, norms: Tensor, shared: Scalar, counts: Flag
    ) -> None:
        """Let the averages follow, and beside them those in which zeros leave no trace."""
        is_warm, limits = self._used
        active = self._active.align(step.gradients.names, norms.device)
        smallest = torch.minimum(gamma, norms if self.warmup_norms == "raw" else norms * shared)
        with_zeros = adagc_average(gamma, norms, limits, beta=self.beta)
        without = adagc_average(active, norms, self.lambda_rel * active, beta=self.beta)
        told = step.gradients.present & counts
        is_zero = norms == 0
        tells = told & ~(is_zero & (gamma.isposinf() | is_warm))
        active = torch.where(told & ~is_zero, _rows(is_warm, smallest, without), active)
        gamma = torch.where(tells, _rows(is_warm, smallest, with_zeros), gamma)
        self._active.set(active)
        self._gamma.set(torch.maximum(gamma, active / 2))
        self._steps = self._steps + counts


def _rows(condition: Flag, chosen: Tensor, otherwise: Tensor) -> Tensor:
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, otherwise)
    return chosen if condition else otherwise
