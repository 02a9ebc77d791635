"""Clipping single gradient elements against the second moment, and resetting momentum.

Huang et al.: SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training (arXiv 2501.06842).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl, moments
from stablekit.arguments import number, plugin_name, whole
from stablekit.errors import AttachError
from stablekit_clipping._loan import Loan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["SPAM", "clip_to_moment_", "warmup_factor"]

_CHUNK = 2**16


def warmup_factor(since: int, warmup_steps: int) -> float:
    """Return the factor on the learning rate, ``since`` updates after a reset.

    ``1 - 0.99 * (1 + cos(pi * since / (warmup_steps + 1))) / 2``, and 1 from ``warmup_steps`` on.

    Example:
        >>> [round(warmup_factor(n, 150), 4) for n in (0, 75, 149, 150)]
        [0.01, 0.4999, 0.9996, 1.0]
    """
    if since >= warmup_steps:
        return 1.0
    return 1 - 0.99 * (1 + math.cos(math.pi * since / (warmup_steps + 1))) / 2


def clip_to_moment_(
    gradient: Tensor, moment: Tensor, threshold: float, *, look: bool = True
) -> Tensor:
    """Lower elements with ``g**2 > threshold * v`` to ``sign(g) * sqrt(threshold * v)``, in place.

    ``v`` is the second moment. Elements whose moment is 0 stay: nothing is known of them yet.

    Args:
        gradient: changed in place.
        moment: second moment, in the gradient's shape.
        threshold: how many times the moment a squared element may be.
        look: read on the host which pieces have such elements, and write to those only.

    Returns:
        0-dim bool, whether there was such an element.

    Example:
        >>> g = torch.tensor([1.0, -9.0, 9.0])
        >>> clip_to_moment_(g, torch.tensor([1.0, 1.0, 0.0]), 4.0), g
        (tensor(True), tensor([ 1., -2.,  9.]))
    """
    found = torch.zeros((), dtype=torch.bool, device=gradient.device)
    for piece, of in _pieces(gradient, moment, _CHUNK if look else gradient.numel()):
        limit = (of.float() * threshold).sqrt_()
        over = (piece.abs() > limit) & (limit > 0)
        any_over = over.any()
        if not look or bool(any_over):
            piece.copy_(torch.where(over, torch.copysign(limit, piece).to(piece.dtype), piece))
        found |= any_over
    return found


@final
class SPAM:
    """Clip elements that stand out against Adam's second moment; reset momentum periodically.

    * Elements with ``g**2 > threshold * v`` become ``sign(g) * sqrt(threshold * v)``, ``v`` as the
      last update left it; not in the first ``grad_accu_steps`` updates and as many after a reset.
    * Every ``reset_interval`` updates both moments are set to zero before that update, and the
      learning rate grows back from 1% along a cosine over ``warmup_steps`` updates.

    Clipped gradients and learning rates are those of the authors' optimizer; the update is that of
    the optimizer attached to. Theirs divides by ``sqrt(v) + eps`` without bias correction inside,
    and decays weights after the update by the full learning rate, where AdamW's decay follows the
    lowered one. Theirs does not restart bias corrections at a reset either, so that the updates
    after one are about three times as large as Adam's, at a learning rate of 1%.

    What is ours: an element without a second moment is not clipped (there it would be set to zero,
    and stay zero until the next reset: rare tokens, new experts). The ``density`` option is not
    here. Without a second moment (SGD, Lion, Muon) give ``threshold=0``: resets and warm-up stay.

    Args:
        threshold: how many times its second moment a squared element may be; 0 not to clip.
        reset_interval: updates between two resets; 0 for none.
        warmup_steps: length of the learning rate's cosine after a reset, in updates.
        grad_accu_steps: updates without clipping, at the start and after a reset.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
        AttachError: The optimizer keeps no second moment, or nothing to reset.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> plugin = SPAM(threshold=4.0, grad_accu_steps=3)
        >>> optimizer = stablekit.wrap(torch.optim.AdamW([p]), plugin)
        >>> for g in (1.0, 1.0, 100.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> p.grad
        tensor([0.0894])
    """

    cost = "two reads of the gradients and one of the second moments; writes where it clips"
    needs = ("elements", "parameters")

    def __init__(
        self,
        threshold: float = 5000.0,
        *,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        grad_accu_steps: int = 20,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.threshold = number("threshold", threshold, at_least=0)
        self.reset_interval = whole("reset_interval", reset_interval)
        self.warmup_steps = whole("warmup_steps", warmup_steps)
        self.grad_accu_steps = whole("grad_accu_steps", grad_accu_steps)
        if self.threshold and 0 < self.reset_interval <= self.grad_accu_steps:
            raise ValueError(
                f"reset_interval must be above grad_accu_steps={self.grad_accu_steps}, or nothing"
                f" is ever clipped, got {self.reset_interval}; threshold=0 is for resets alone"
            )
        self.name = plugin_name(name, "spam")
        self._resets = moments.Resets(self.reset_interval, self.name)
        self._loan = Loan()

    @classmethod
    def example(cls) -> SPAM:
        """Return an instance that clips and resets within a short run, on parts of groups too."""
        return cls(4.0, reset_interval=10, warmup_steps=0, grad_accu_steps=2)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Give back what an optimizer that raised could not."""
        self._loan.restore()

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip elements, where second moments have settled."""
        clipped: Tensor | float = 0.0
        if self.threshold and self._has_settled(step):
            flags = self._clip(step)
            clipped = flags.float().mean() if flags.numel() else 0.0
        step.record("clipped", clipped)

    @hookimpl
    def before_update(self, step: Step) -> None:
        """Clear the moments where a reset is due; lower the learning rate after one."""
        if self._resets.is_due(step):
            self._resets.clear(step)
        if self.warmup_steps and self.reset_interval:
            factor = 1.0
            if self._resets.last:
                factor = warmup_factor(step.updates + 1 - self._resets.last, self.warmup_steps)
            self._loan.scale_lr(step, factor)
            step.record("lr_factor", factor)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Give the learning rate back."""
        self._loan.restore()
        self._resets.check(step)
        if self.threshold and all(moments.second(state) is None for state in step.states):
            kinds = ", ".join(type(one).__name__ for one in step.session.optimizers)
            raise AttachError(
                f"{self.name} clips against the second moment, and {kinds} keeps none that"
                " stablekit knows; give threshold=0 to have only its resets, or use an Adam"
            )

    @hookimpl
    def on_skip(self, step: Step) -> None:
        """Repeat a reset that was due in a step which turned out to be skipped."""
        self._resets.missed(step)

    @hookimpl
    def on_detach(self) -> None:
        """Leave the groups as they were."""
        self._loan.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the update of the latest reset."""
        return {"reset_at": self._resets.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: It is negative.
        """
        self._resets.last = whole("reset_at", state["reset_at"])

    def _has_settled(self, step: Step) -> bool:
        update = step.updates + 1
        since = update % self.reset_interval if self.reset_interval else update
        return min(update, since) >= self.grad_accu_steps

    def _clip(self, step: Step) -> Tensor:
        """Clip all gradients and return which tensors were clipped, bool ``[P]``."""
        gradients = step.gradients
        known = dict(zip(gradients.names, map(moments.second, step.states), strict=True))
        found = dict.fromkeys(gradients.names, torch.zeros((), dtype=torch.bool))
        edit = gradients.edit()
        for name, gradient in edit:
            moment = known[name]
            if moment is not None:
                found[name] = clip_to_moment_(
                    gradient, moment, self.threshold, look=step.session.host
                )
        if not found:
            return torch.zeros(0)
        flags = torch.stack([flag.to(gradients.device) for flag in found.values()])
        if any(hasattr(param, "placements") for param in step.parameters):
            flags = step.session.reduce(flags.float(), "max") > 0
        if step.session.host:
            names = zip(gradients.names, flags.tolist(), strict=True)
            edit.touched(name for name, was_clipped in names if was_clipped)
        return flags


def _pieces(gradient: Tensor, moment: Tensor, size: int) -> zip[tuple[Tensor, Tensor]]:
    if not (gradient.is_contiguous() and moment.is_contiguous()):
        return zip([gradient], [moment], strict=True)
    pieces = (tensor.view(-1).split(max(size, 1)) for tensor in (gradient, moment))
    return zip(*pieces, strict=True)
