"""Clipping gradient norms that stand out from their own running statistics.

Kumar, Kasa, et al.: ZClip: Adaptive Spike Mitigation for LLM Pre-Training (arXiv 2504.02507).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import choice, fraction, number, whole
from stablekit.statistics import RunningMoments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["ZClip", "zclip_threshold"]


def zclip_threshold(
    norm: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    z_thresh: float,
    mode: str = "zscore",
    clip_option: str = "adaptive_scaling",
    clip_factor: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return whether a norm is a spike, and the norm to clip it to if it is.

    With ``z = (n - mean) / (std + eps)`` a spike is ``z > z_thresh``, clipped to
    ``(mean + z_thresh**2 / z * std) * clip_factor`` ("adaptive_scaling") or to ``mean`` ("mean");
    in mode "percentile" a spike is ``n > mean + z_thresh * std``, clipped to that.

    Args:
        norm: the gradient norm, 0-dim; so are ``mean`` and ``std`` of the norms before it.
        mean: mean of past norms.
        std: their standard deviation.
        z_thresh: how many standard deviations are too many.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean"; no effect in mode "percentile".
        clip_factor: multiplies the adaptive threshold.
        eps: guards the division.

    Example:
        >>> spike, target = zclip_threshold(
        ...     torch.tensor(5.0), torch.tensor(1.0), torch.tensor(0.5), z_thresh=2.0
        ... )
        >>> bool(spike), round(target.item(), 4)
        (True, 1.25)
    """
    if mode == "percentile":
        limit = mean + z_thresh * std
        return norm > limit, limit
    z = (norm - mean) / (std + eps)
    if clip_option == "mean":
        return z > z_thresh, mean
    return z > z_thresh, (mean + z_thresh * std / (z / z_thresh)) * clip_factor


@final
class ZClip:
    """Clip the global norm when its z-score is too high, to a norm that falls as z grows.

    In the first ``warmup_steps`` only ``max_grad_norm`` acts while mean and variance are taken;
    after that see :func:`zclip_threshold`. Mean and variance then follow as exponential averages,
    fed with the clipped norm in a spike and with the raw norm otherwise.

    Where it differs from the paper: ``max_grad_norm``, mode "percentile", ``clip_factor`` and
    ``skip_update_on_spike`` are the authors' package's (zclip 1.0.0), with its defaults. Note that
    ``max_grad_norm=1`` hides the adaptive part while the mean norm is above 1.

    Where it differs from the package: a norm that is not finite never enters the statistics (there,
    one NaN, or one Inf in warm-up, switches adaptive clipping off for good); a zero norm does not
    count towards the warm-up, and a run of zero norms enters the averages once; the norm does not
    depend on the first parameter's dtype; statistics are saved with the optimizer.

    Args:
        z_thresh: z-score above which a norm is a spike, above 0.
        alpha: weight of the past in the averages, between 0 and 1.
        max_grad_norm: constant limit on top, or None.
        eps: guards the division by the standard deviation.
        warmup_steps: how many norms make the first mean and variance.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean".
        clip_factor: multiplies the adaptive threshold, above 0.
        skip_update_on_spike: leave the statistics alone in a spike.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> plugin = ZClip(warmup_steps=4, max_grad_norm=None)
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), plugin)
        >>> for g in (1.0, 1.2, 1.0, 1.2, 50.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> round(stablekit.session(optimizer).metrics()["grad_norm_clipped"], 2)
        1.1
    """

    cost = "one read of the gradients; one write in steps that clip"

    def __init__(
        self,
        z_thresh: float = 2.5,
        *,
        alpha: float = 0.97,
        max_grad_norm: float | None = 1.0,
        eps: float = 1e-6,
        warmup_steps: int = 25,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start without statistics."""
        self.z_thresh = number("z_thresh", z_thresh, above=0)
        self.alpha = fraction("alpha", alpha)
        self.max_grad_norm = (
            None if max_grad_norm is None else number("max_grad_norm", max_grad_norm, above=0)
        )
        self.eps = number("eps", eps, at_least=0)
        self.warmup_steps = whole("warmup_steps", warmup_steps, at_least=1)
        self.mode = choice("mode", mode, ("zscore", "percentile"))
        self.clip_option = choice("clip_option", clip_option, ("adaptive_scaling", "mean"))
        self.clip_factor = number("clip_factor", clip_factor, above=0)
        self.skip_update_on_spike = bool(skip_update_on_spike)
        self.name = name or "zclip"
        self._moments = RunningMoments(warmup=self.warmup_steps, alpha=self.alpha)
        self._was_zero = torch.zeros((), dtype=torch.bool)
        self._before = (torch.zeros((), dtype=torch.bool), torch.zeros(()), torch.zeros(()))

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip a spike, then let the statistics follow."""
        gradients = step.gradients
        norm = gradients.norm()
        if step.evaluation == 0:
            self._moments.to(norm.device)
            self._before = self._moments.ready, self._moments.mean, self._moments.var.sqrt()
        ready, mean, std = self._before
        is_spike, target = zclip_threshold(
            norm,
            mean,
            std,
            z_thresh=self.z_thresh,
            mode=self.mode,
            clip_option=self.clip_option,
            clip_factor=self.clip_factor,
            eps=self.eps,
        )
        is_spike = is_spike & ready
        if step.evaluation == 0:
            self._learn(norm, is_spike, target, step.learning)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        allowed = torch.where(is_spike, target, math.inf).clamp(max=limit)
        factor = torch.where(norm > allowed, allowed / (norm + 1e-6), 1.0)
        factor = torch.where(norm.isposinf(), 0.0, factor)
        gradients.scale_(factor)
        warned = torch.where(ready, mean + self.z_thresh * (std + self.eps), math.inf)
        step.record("threshold", warned.clamp(max=limit))
        step.record("factor", factor)
        step.record("clipped", (factor < 1).float())

    def state_dict(self) -> dict[str, Any]:
        """Return count, mean and variance of the norms."""
        return {**self._moments.state_dict(), "was_zero": bool(self._was_zero)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved statistics.

        Raises:
            ValueError: A field is missing or not a finite number.
        """
        if not isinstance(state["was_zero"], bool):
            raise ValueError(f"was_zero must be a bool, got {state['was_zero']!r}")
        self._moments.load_state_dict(state)
        self._was_zero = torch.tensor(state["was_zero"])

    def _learn(self, norm: Tensor, is_spike: Tensor, target: Tensor, learning: Tensor) -> None:
        ready = self._before[0]
        is_zero = norm == 0
        tells = ~is_zero | (ready & ~self._was_zero.to(norm.device))
        when = learning & norm.isfinite() & tells
        self._was_zero = torch.where(learning, is_zero, self._was_zero.to(norm.device))
        if self.skip_update_on_spike:
            when = when & ~is_spike
        self._moments.update(torch.where(is_spike, target, norm), when=when)
