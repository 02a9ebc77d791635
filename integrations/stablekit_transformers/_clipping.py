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

    from stablekit import Session

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


@final
class BuiltInClipping:
    """What becomes of ``args.max_grad_norm`` while a session is at work."""

    def __init__(self) -> None:
        """Begin with nothing set aside."""
        self._given: float | None = None

    def limit(self, args: TrainingArguments) -> float:
        """Return the ``max_grad_norm`` that the user asked for, 0 for none."""
        return args.max_grad_norm or self._given or 0.0

    def set_aside(self, args: TrainingArguments, session: Session) -> None:
        """Set ``max_grad_norm`` to 0, unless the session changes nothing."""
        if not session.dry_run and args.max_grad_norm:
            self._given, args.max_grad_norm = args.max_grad_norm, 0.0

    def give_back(self, args: TrainingArguments) -> None:
        """Restore ``max_grad_norm``, unless somebody has set it meanwhile."""
        if self._given is not None:
            args.max_grad_norm, self._given = self.limit(args), None


def substitute(session: Session, limit: float, *, tell: bool) -> tuple[str, ...]:
    """Return the plugin that clips in Trainer's stead, if no other changes gradients.

    Args:
        session: the plugins at work.
        limit: ``max_grad_norm``, 0 for none.
        tell: whether to log what becomes of it.
    """
    if not limit:
        return ()
    clips = any("transform_gradients" in hooks_of(plugin) for plugin in session.plugins.values())
    said = _DRY if session.dry_run else _LEFT_OUT if clips else _REPLACED
    if tell:
        _LOGGER.warning(said.format(limit=limit, names=", ".join(session.plugins) or "no plugin"))
    return (f"global-norm:max_norm={limit!r}",) if said is _REPLACED else ()


def norm_only(accelerator: Any, clip: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ANN401 - untyped upstream
    """Return an ``Accelerator.clip_grad_norm_`` that unscales and measures, and does not clip.

    Trainer 5 calls it with Inf to log the norm; the original then turns one Inf into all NaN.
    """

    def measure(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:  # noqa: ANN401
        kind = accelerator.distributed_type.value
        flat = kind == "FSDP" and not accelerator.is_fsdp2
        if flat or kind in {"DEEPSPEED", "XLA"}:  # only the engine can measure
            return clip(parameters, math.inf, norm_type)
        accelerator.unscale_gradients()
        grads = [param.grad for param in parameters if param.grad is not None]
        norm = get_total_norm(grads, norm_type)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    return measure
