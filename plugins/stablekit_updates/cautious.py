"""Dropping the elements of an update that point against the gradient.

Liang et al.: Cautious Optimizers: Improving Training with One Line of Code (arXiv 2411.16085).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import plugin_name
from stablekit.errors import AttachError
from stablekit.gradients import local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["Cautious", "cautious_mask"]

_DECOUPLED = ("AdamW", "NAdamW", "RAdamW", "Lion", "Muon", "SGDW")


def cautious_mask(update: Tensor, gradient: Tensor) -> Tensor:
    """Return where an update goes downhill: ``update * gradient < 0``.

    Args:
        update: what is added to the parameters.
        gradient: as the optimizer saw it.

    Example:
        >>> cautious_mask(torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0]))
        tensor([ True, False, False])
    """
    return update * gradient < 0


@final
class Cautious:
    """Keep the elements of each update that go downhill, scaled up by the share of those kept.

    ``p <- d + u * mask / max(mean(mask), 1e-3)``, where ``d`` is the parameter after weight decay,
    ``u`` the rest of the update and ``mask = (u * g < 0)``. On ``torch.optim.AdamW`` this is the
    authors' C-AdamW, with the normaliser of timm; their own foreach code masks nothing. A method
    to learn faster rather than more steadily: what is kept grows by ``1 / mean(mask)``.

    Memory: one copy of the parameters for the time of the update. List it behind plugins that
    change the learning rate, whose decay it would take for a part of the update otherwise. Sparse
    gradients are refused.

    Args:
        decoupled: whether the optimizer shrinks weights by ``1 - lr * weight_decay`` before its
            update; None takes what the group says, or knows of AdamW, Lion, Muon and the like.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``decoupled`` is not a bool.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
        >>> session = stablekit.attach(optimizer, Cautious())
        >>> for g in ([1.0, 1.0], [1.0, -0.5]):
        ...     w.grad = torch.tensor(g)
        ...     optimizer.step()
        >>> w.data
        tensor([-4.8000, -1.0000])
    """

    cost = "a copy of the parameters, and three passes over them"
    needs = ("parameters",)

    def __init__(self, *, decoupled: bool | None = None, name: str | None = None) -> None:
        """Check the arguments."""
        if not (decoupled is None or isinstance(decoupled, bool)):
            raise TypeError(f"decoupled must be true, false or None, got {decoupled!r}")
        self.decoupled = decoupled
        self.name = plugin_name(name, "cautious")
        self._before: list[Tensor | None] = []

    @hookimpl
    def before_update(self, step: Step) -> None:
        """Keep the parameters, shrunk as weight decay will shrink them.

        Raises:
            AttachError: A gradient is sparse.
        """
        if any(param.grad is not None and param.grad.is_sparse for param in step.parameters):
            raise AttachError(
                f"{self.name} compares updates with whole gradients, and one is sparse; leave out"
                " that parameter with stablekit.only(..., exclude=...)"
            )
        self._before = [
            None if param.grad is None else local(param.detach()) * self._kept(step, group)
            for param, group in zip(step.parameters, step.groups, strict=True)
        ]

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Drop the elements that go uphill."""
        parts = [
            None if before is None else (before, local(param.detach()), _downhill(param, group))
            for before, param, group in zip(self._before, step.parameters, step.groups, strict=True)
        ]
        self._before = []
        masks = [p if p is None else cautious_mask(p[1] - p[0], p[2]) for p in parts]
        roots = step.norms_of(
            [m if m is None else m.sum().float().sqrt().reshape(1) for m in masks]
        )
        counts = roots.new_tensor([max(param.numel(), 1) for param in step.parameters])
        shares = roots.square() / counts
        for part, mask, share in zip(parts, masks, shares.clamp(min=1e-3).unbind(), strict=True):
            if part is not None and mask is not None:
                before, now, _ = part
                kept = before + (now - before) * (mask / share.to(now.device, now.dtype))
                now.copy_(torch.where(step.ok.to(now.device), kept, now))
        present = step.gradients.present  # on any rank, unlike the masks
        mean = (shares * present).sum() / present.sum()
        step.record("kept", torch.where(present.any(), mean, 1.0))

    def _kept(self, step: Step, group: Mapping[str, Any]) -> float | Tensor:
        """Return what weight decay leaves of a parameter before the update."""
        if not self._is_decoupled(step, group):
            return 1.0
        left: float | Tensor = 1 - group["lr"] * group.get("weight_decay", 0.0)
        return left

    def _is_decoupled(self, step: Step, group: Mapping[str, Any]) -> bool:
        if self.decoupled is not None:
            return self.decoupled
        if "decoupled_weight_decay" in group:
            return bool(group["decoupled_weight_decay"])
        owners = [
            type(one).__name__
            for one in step.session.optimizers
            if any(own is group for own in one.param_groups)
        ]
        return any(owner in _DECOUPLED for owner in owners)


def _downhill(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the gradient of what is minimised."""
    assert param.grad is not None
    gradient = local(param.grad)
    return -gradient if group.get("maximize", False) else gradient
