"""``accelerator.clip_grad_norm_`` of the loop: measured where it is called, done in the step.

Clipping where it is called would show plugins clipped gradients: every norm is then at most the
limit, which is what they learn, and one NaN has become a NaN in every tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.nn.utils import get_total_norm

from stablekit.gradients import clip_factor
from stablekit.hookspecs import hooks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from accelerate import Accelerator

    from stablekit import Session, Step


class Limit(NamedTuple):
    """What the loop asked for in one call."""

    params: frozenset[int]
    """By ``id``; those without gradient left out."""
    max_norm: float | Tensor
    norm_type: float


@final
class LoopClipping:
    """The limits that the loop has named since the last step."""

    def __init__(self, accelerator: Accelerator, session: Session, *, clips: bool) -> None:
        """Wait for a call."""
        self.accelerator = accelerator
        self.session = session
        self.clips = clips
        self._limits: list[Limit] = []
        self._logger = get_logger("stablekit_accelerate")
        self._told_of_both = False
        self._told_at_once = False

    def takes(self, params: Sequence[Tensor], norm_type: float) -> bool:
        """Tell whether a call is about gradients of this session and can be left to its step."""
        if self.session.dry_run or self.session.is_paused:
            return False
        asked, own = _with_gradients(params), _with_gradients(_parameters(self.session))
        if asked <= own and norm_type in {2, math.inf}:
            return bool(asked)
        if asked & own and not self._told_at_once:
            self._told_at_once = True
            self._logger.warning(
                "accelerator.clip_grad_norm_ was given parameters of another optimizer too, or a"
                " norm that is neither 2 nor infinity: it clips at once, and plugins learn from"
                " gradients that are clipped already"
            )
        return False

    def measure(
        self, params: Sequence[Tensor], max_norm: float | Tensor, norm_type: float
    ) -> Tensor:
        """Return the norm of the unscaled gradients, and note the limit."""
        self.accelerator.unscale_gradients(list(self.session.optimizers))
        limit = Limit(frozenset(_with_gradients(params)), max_norm, float(norm_type))
        if self.clips and (isinstance(max_norm, Tensor) or max_norm != math.inf):
            self._limits = [known for known in self._limits if known.params != limit.params]
            self._limits.append(limit)
            if not self._told_of_both:
                self._told_of_both = True
                self._tell_of_both(max_norm)
        return total_norm([p.grad for p in params if p.grad is not None], limit.norm_type)

    def apply(self, step: Step) -> None:
        """Clip to the limits, in the order of the calls."""
        for limit in self._limits:
            factor = _factor(step, limit)
            step.gradients.scale_(factor)
            step.record("threshold", limit.max_norm)
            step.record("factor", factor.min())
            # At the limit the factor is a rounding below 1, as torch's is.
            step.record("clipped", (factor < 1 - 1e-5).float().mean())

    def clear(self) -> None:
        """Forget the limits: the step they were for is over."""
        self._limits = []

    def _tell_of_both(self, max_norm: float | Tensor) -> None:
        clippers = [
            name
            for name, plugin in self.session.plugins.items()
            if "transform_gradients" in hooks_of(plugin) and name != "accelerate"
        ]
        if clippers:
            self._logger.warning(
                f"accelerator.clip_grad_norm_(max_norm={float(max_norm):g}) clips after"
                f" {', '.join(clippers)}: drop the call, or attach with loop_clips=False, if they"
                " are to decide alone"
            )


def total_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of gradients together, whole or on whatever meshes, on every rank.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])], 2.0)
        tensor(5.)
    """
    meshes: dict[object, list[Tensor]] = {}
    for grad in grads:
        meshes.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [get_total_norm(group, norm_type) for group in meshes.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(whole), norm_type)
    return total


def _factor(step: Step, limit: Limit) -> Tensor:
    """Return what to multiply by: one number, or one for each tensor if not all are meant."""
    gradients, params = step.gradients, step.parameters
    meant = [id(param) in limit.params or param.grad is None for param in params]
    if all(meant) and limit.norm_type == 2:
        return clip_factor(gradients.norm(), limit.max_norm)
    norms = gradients.norms() if limit.norm_type == 2 else gradients.amaxes()
    chosen = torch.tensor(meant, device=norms.device)
    total = torch.linalg.vector_norm(torch.where(chosen, norms, 0.0), limit.norm_type)
    return torch.where(chosen, clip_factor(total, limit.max_norm), 1.0)


def _parameters(session: Session) -> Iterable[Tensor]:
    for optimizer in session.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _with_gradients(params: Iterable[Tensor]) -> set[int]:
    return {id(param) for param in params if param.grad is not None}
