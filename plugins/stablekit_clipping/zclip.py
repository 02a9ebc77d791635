"""Clipping gradient norms that stand out from their own running statistics.

Kumar et al.: ZClip: Adaptive Spike Mitigation for LLM Pre-Training (arXiv 2504.02507).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

from stablekit import hookimpl
from stablekit.arguments import choice, flag, fraction, number, plugin_name, whole
from stablekit.scalars import invert, is_finite, like, minimum, ratio, sqrt, where
from stablekit.statistics import RunningMoments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step
    from stablekit.scalars import Flag, Scalar

__all__ = ["ZClip", "zclip_threshold"]


def zclip_threshold(
    norm: Scalar,
    mean: Scalar,
    std: Scalar,
    *,
    z_thresh: float,
    mode: str = "zscore",
    clip_option: str = "adaptive_scaling",
    clip_factor: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Flag, Scalar]:
    """Return whether a norm is a spike, and the norm to clip it to if it is.

    With ``z = (n - mean) / (std + eps)`` a spike is ``z > z_thresh``, clipped to
    ``(mean + z_thresh**2 / z * std) * clip_factor`` ("adaptive_scaling") or to ``mean`` ("mean");
    in mode "percentile" a spike is ``n > mean + z_thresh * std``, clipped to that.

    Args:
        norm: the gradient norm, a float or a 0-dim tensor; likewise ``mean`` and ``std``.
        mean: mean of past norms.
        std: their standard deviation.
        z_thresh: how many standard deviations are too many.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean"; no effect in mode "percentile".
        clip_factor: multiplies the adaptive threshold.
        eps: guards the division.

    Example:
        >>> spike, target = zclip_threshold(5.0, 1.0, 0.5, z_thresh=2.0, eps=0.0)
        >>> spike, round(target, 4)
        (True, 1.25)
    """
    if mode == "percentile":
        limit = mean + z_thresh * std
        return norm > limit, limit
    z = ratio(norm - mean, std + eps)
    if clip_option == "mean":
        return z > z_thresh, mean
    return z > z_thresh, (mean + ratio(std * z_thresh**2, z)) * clip_factor


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
    one NaN, or one Inf in warm-up, switches adaptive clipping off for good); a zero norm enters
    only while zeros make up at most half of the mean (there, a warm-up of zeros, or a long run of
    them, takes the mean to 0 and every later gradient with it); the norm does not depend on the
    first parameter's dtype; statistics are saved with the optimizer.

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
        >>> import torch, stablekit
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
        self.skip_update_on_spike = flag("skip_update_on_spike", skip_update_on_spike)
        self.name = plugin_name(name, "zclip")
        self._moments = RunningMoments(warmup=self.warmup_steps, alpha=self.alpha)
        self._zeros: Scalar = 0.0
        self._before: tuple[Flag, Scalar, Scalar] = (False, 0.0, 0.0)

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip a spike, then let the statistics follow."""
        norm = step.scalar(step.gradients.norm())
        if step.evaluation == 0:
            self._moments.align(norm)
            self._zeros = like(self._zeros, norm)
            self._before = self._moments.ready, self._moments.mean, sqrt(self._moments.var)
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
            self._learn(norm, is_spike, target, step.flag(step.learning))
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        allowed = minimum(where(is_spike, target, math.inf), limit)
        factor = where(norm > allowed, ratio(allowed, norm + 1e-6), 1.0)
        factor = where(norm == math.inf, 0.0, factor)
        step.gradients.scale_(factor)
        alarm = mean + (std if self.mode == "percentile" else std + self.eps) * self.z_thresh
        step.record("threshold", minimum(where(ready, alarm, math.inf), limit))
        step.record("factor", factor)
        step.record("clipped", factor < 1)

    def state_dict(self) -> dict[str, Any]:
        """Return count, mean and variance of the norms, and the share of zeros in the mean."""
        return {**self._moments.state_dict(), "zeros": float(self._zeros)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved statistics.

        Raises:
            TypeError: A field is not a number.
            ValueError: A field is not finite, or is negative.
        """
        zeros = number("zeros", state["zeros"], at_least=0)
        number("mean", state["mean"], at_least=0)
        self._moments.load_state_dict(state)
        self._zeros = zeros

    def _learn(self, norm: Scalar, is_spike: Flag, target: Scalar, learning: Flag) -> None:
        is_zero = norm == 0
        in_warmup = self._zeros + is_zero * (1.0 / self.warmup_steps)
        after = self._zeros * self.alpha + is_zero * (1.0 - self.alpha)
        zeros = where(self._before[0], after, in_warmup)
        when = learning & is_finite(norm) & invert(is_zero & (zeros > 0.5))
        if self.skip_update_on_spike:
            when = when & invert(is_spike)
        self._moments.update(where(is_spike, target, norm), when=when)
        self._zeros = where(when, zeros, self._zeros)
