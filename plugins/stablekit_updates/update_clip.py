"""Limiting updates whose gradients are large against Adam's second moment: StableAdamW.

Wortsman et al.: Stable and Low-Precision Training for Large-Scale Vision-Language Models
(arXiv 2304.13013); after Adafactor, Shazeer and Stern (arXiv 1804.04235), section 6.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl, moments
from stablekit.arguments import number, plugin_name
from stablekit.errors import AttachError
from stablekit.gradients import local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["UpdateClip", "moment_ratio_square"]

_CHUNK = 2**16


def moment_ratio_square(
    gradient: Tensor, moment: Tensor, *, beta2: float, update: float | Tensor, eps: float
) -> Tensor:
    """Return the sum of ``g**2 / max(v, eps**2)``, ``v`` the debiased moment after this gradient.

    ``v = (beta2 * moment + (1 - beta2) * g**2) / (1 - beta2**update)``.

    Args:
        gradient: of any shape.
        moment: second moment before the update, in the gradient's shape.
        beta2: weight of the past in it.
        update: number of this update, from 1.
        eps: the optimizer's.

    Example:
        >>> g = torch.tensor([3.0, -4.0])
        >>> moment_ratio_square(g, torch.zeros(2), beta2=0.99, update=1, eps=1e-8)
        tensor(2.)
    """
    debias = 1 - beta2**update
    kind = torch.promote_types(gradient.dtype, torch.float32)
    pieces = gradient.reshape(-1).split(_CHUNK), moment.reshape(-1).split(_CHUNK)
    totals = []
    for piece, before in zip(*pieces, strict=True):
        square = piece.to(kind).square()
        after = torch.lerp(before.to(kind), square, 1 - beta2).div_(debias).clamp_(min=eps**2)
        totals.append(square.div_(after).sum())
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum()


@final
class UpdateClip:
    """Divide a tensor's update by ``max(1, RMS / threshold)``, weight decay included.

    ``RMS = sqrt(mean(g**2 / max(v, eps**2)))`` over the tensor, ``v`` Adam's debiased second moment
    with ``g`` in it. It is 1 when ``v`` is what the gradients are, and above it when they grew
    faster than ``v`` could follow: some steps before a loss spike, as the paper shows. On
    ``torch.optim.AdamW`` the result is StableAdamW. It replaces gradient clipping: with both, a
    spike is divided away twice.

    Any optimizer will do that has ``betas`` and keeps a second moment under a name
    :mod:`stablekit.moments` knows. Memory: a copy of the tensors whose RMS is above the threshold,
    until their update is made; in device mode, where that is not known on the host, of all.

    Args:
        threshold: above it updates are divided; above 0, the paper's is 1.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``threshold`` is not a number.
        ValueError: ``threshold`` is not above 0.
        AttachError: The optimizer keeps no second moment, or has no betas.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.AdamW([w], betas=(0.9, 0.99), weight_decay=0.0)
        >>> session = stablekit.attach(optimizer, UpdateClip())
        >>> for g in (1.0, 100.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> round(session.metrics()["update-clip/factor"], 4)
        0.7089
    """

    cost = "one read of the gradients and of the second moments; a copy of the tensors it acts on"
    needs = ("parameters",)

    def __init__(self, threshold: float = 1.0, *, name: str | None = None) -> None:
        """Check the threshold."""
        self.threshold = number("threshold", threshold, above=0)
        self.name = plugin_name(name, "update-clip")
        self._before: dict[int, tuple[Tensor, Tensor | float]] = {}

    @hookimpl
    def before_update(self, step: Step) -> None:
        """Find out which updates are too large, and keep their tensors."""
        params = step.parameters
        held = zip(params, step.states, step.groups, strict=True)
        ratios = step.norms_of([self._ratio(step, *one) for one in held])
        counts = ratios.new_tensor([max(param.numel(), 1) for param in params])
        factors = 1 / (ratios / counts.sqrt() / self.threshold).clamp(min=1.0)
        factors = torch.where(factors.isfinite(), factors, 1.0)
        self._before = {
            i: (local(params[i].detach()).clone(), factor)
            for i, factor in enumerate(factors.tolist() if step.session.host else factors.unbind())
            if not step.session.host or factor < 1
        }
        if factors.numel():
            step.record("rms", (ratios / counts.sqrt()).max())
            step.record("factor", factors.min())
            step.record("clipped", (factors < 1).float().mean())

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Take back the part of the updates that is too much."""
        params = step.parameters
        for i, (before, factor) in self._before.items():
            now = local(params[i].detach())
            now.copy_(torch.lerp(before, now, _weight(factor, now)))
        self._before = {}

    def _ratio(
        self, step: Step, param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the root of this rank's part of the sum of squared ratios, one element."""
        if param.grad is None:
            return None
        moment = moments.second(state)
        if moment is None:
            self._require(step, state, group)
            root = math.sqrt(local(param.grad).numel())
            return torch.full((1,), root, device=local(param.grad).device)
        total = moment_ratio_square(
            local(param.grad),
            moment,
            beta2=float(self._beta2(group)),
            update=_number(state) + 1,
            eps=float(group.get("eps", 1e-8)),
        )
        return total.sqrt().reshape(1)

    def _require(self, step: Step, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Refuse an optimizer that has made an update and kept no second moment."""
        self._beta2(group)
        if state:
            kinds = ", ".join(type(one).__name__ for one in step.session.optimizers)
            raise AttachError(
                f"{self.name} needs a second moment as Adam's, and {kinds} keeps none that"
                " stablekit knows"
            )

    def _beta2(self, group: Mapping[str, Any]) -> float | Tensor:
        betas = group.get("betas")
        if not isinstance(betas, (tuple, list)) or len(betas) < 2:
            raise AttachError(f"{self.name} needs an optimizer with betas=(beta1, beta2), as Adam")
        beta2: float | Tensor = betas[1]
        return beta2


def _number(state: Mapping[str, Any]) -> float | Tensor:
    """Return how many updates a parameter has had."""
    count = state.get("step", 0)
    if isinstance(count, Tensor) and count.device.type == "cpu":
        return float(count)
    number: float | Tensor = count
    return number


def _weight(factor: Tensor | float, like: Tensor) -> Tensor | float:
    return factor.to(like.device, like.dtype) if isinstance(factor, Tensor) else factor
