"""Trainer's own gradient clipping, which acts before every plugin: set aside, or done in turn."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, final

from torch.nn.utils import get_total_norm

from stablekit.hookspecs import hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from transformers import TrainingArguments

    from stablekit import Plugin, Session

_LOGGER = logging.getLogger("stablekit_transformers")
_DRY = (
    "dry run of {names}: Trainer clips to max_grad_norm={limit:g} before them, so they see clipped"
    " gradients; set max_grad_norm=0 to show them what backward left"
)
_LEFT_OUT = (
    "max_grad_norm={limit:g} is not applied in this training, it would hide the gradients from"
    " {names}; list 'global-norm:max_norm={limit:g}' to have both"
)
_REPLACED = (
    "max_grad_norm={limit:g} is applied by the plugin global-norm, so that {names} can see the"
    " gradients before they are clipped"
)
_ONLY_LOSSES = "max_grad_norm={limit:g} is applied by the plugin global-norm"


@final
class BuiltInClipping:
    """What becomes of ``args.max_grad_norm`` while a session is at work."""

    def __init__(self) -> None:
        """Begin with nothing set aside."""
        self._given: float | None = None
        self._args: TrainingArguments | None = None

    def limit(self, args: TrainingArguments) -> float:
        """Return the ``max_grad_norm`` that the user asked for, 0 for none."""
        return args.max_grad_norm or self._given or 0.0

    def set_aside(self, args: TrainingArguments, session: Session) -> None:
        """Set ``max_grad_norm`` to 0, unless the session changes nothing."""
        if not session.dry_run and args.max_grad_norm:
            self._given, args.max_grad_norm = args.max_grad_norm, 0.0
            self._args = args

    def give_back(self) -> None:
        """Restore ``max_grad_norm``, unless somebody has set it meanwhile."""
        if self._args is not None:
            self._args.max_grad_norm = self.limit(self._args)
        self._args = self._given = None


def substitute(session: Session, limit: float, *, tell: bool) -> tuple[str, ...]:
    """Return the plugin that clips in Trainer's stead, if no other changes gradients.

    Args:
        session: the plugins at work.
        limit: ``max_grad_norm``, 0 for none.
        tell: whether to log what becomes of it.
    """
    if not limit:
        return ()
    seeing = [name for name, plugin in session.plugins.items() if not _is_of_loss(plugin)]
    clips = any("transform_gradients" in hooks_of(session.plugins[name]) for name in seeing)
    without = _REPLACED if seeing or not session.plugins else _ONLY_LOSSES
    said = _DRY if session.dry_run else _LEFT_OUT if clips else without
    if tell:
        _LOGGER.warning(
            said.format(limit=limit, names=", ".join(seeing or session.plugins) or "no plugin")
        )
    return (f"global-norm:max_norm={limit!r}",) if said is without else ()


def _is_of_loss(plugin: Plugin) -> bool:
    """Tell whether a plugin acts on the loss: what it does to gradients does not clip them."""
    return "loss" in getattr(plugin, "needs", ())


def norm_only(
    accelerator: Any,  # noqa: ANN401 - untyped upstream
    clip: Callable[..., Any],
    is_off: Callable[[], bool],
) -> Callable[..., Any]:
    """Return an ``Accelerator.clip_grad_norm_`` that measures and does not clip, unless off.

    Trainer 5 calls it with Inf to log the norm; the original then turns one Inf into all NaN.
    """

    def measure(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:  # noqa: ANN401
        if is_off():
            return clip(parameters, max_norm, norm_type)
        kind = accelerator.distributed_type.value
        flat = kind == "FSDP" and not accelerator.is_fsdp2
        if flat or kind in {"DEEPSPEED", "XLA"}:  # only the engine can measure
            return clip(parameters, math.inf, norm_type)
        accelerator.unscale_gradients()
        grads = [param.grad for param in parameters if param.grad is not None]
        norm = get_total_norm(grads, norm_type)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    return measure
