"""Finding out that a model's forward is Liger's, which computes no logits in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["refuse_liger"]


def refuse_liger(model: nn.Module, plugin: str) -> None:
    """Raise if a module in a model has a forward of Liger's fused linear cross entropy.

    It multiplies hidden states with the weight of the head within the loss, so that neither the
    head nor ``loss_function`` is called.

    Raises:
        AttachError: It has.
    """
    if any(_is_fused(module.forward) for module in model.modules()):
        raise AttachError(
            f"{plugin} needs logits, but Liger's fused linear cross entropy replaced the forward of"
            f" {type(model).__name__} and computes none in training. Set use_liger_kernel=False, or"
            " liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': True}"
        )


def _is_fused(forward: Any) -> bool:  # noqa: ANN401 - a function, bound or wrapped
    while True:
        made_in = getattr(forward, "__module__", None) or ""
        # RMSNorm and MLP of Liger are fine; forwards that compute a loss live beside the models.
        if made_in.startswith("liger_kernel.transformers.model."):
            return True
        inner = getattr(forward, "__func__", getattr(forward, "__wrapped__", None))
        if inner is None:
            return False
        forward = inner
