"""Which parameters surgeries added, so that weight decay can leave them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import LayerNorm

from stablekit_layers._marks import bare

if TYPE_CHECKING:
    from torch import nn

__all__ = ["no_decay", "parameter_groups"]


def no_decay(model: nn.Module) -> list[str]:
    """Return the names of parameters that surgeries added: gains and biases, none to be decayed.

    The decay groups of ``transformers.Trainer`` leave them out by name already; this is for those
    who build groups by another rule.

    Example:
        >>> from torch import nn
        >>> no_decay(nn.Linear(2, 2))
        []
    """
    return [
        f"{name}.{key}" if name else key
        for name, module in bare(model).named_modules()
        if _is_ours(name, module)
        for key, _ in module.named_parameters(recurse=False)
    ]


def _is_ours(name: str, module: nn.Module) -> bool:
    """Tell modules of surgeries; no known family names a LayerNorm of its own like that."""
    is_norm = isinstance(module, LayerNorm) and name.endswith("_norm")
    return is_norm or type(module).__module__.partition(".")[0] == "stablekit_layers"


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: matrices, which decay, and everything else.

    Biases, norms and whatever surgeries added do not decay.

    Example:
        >>> from torch import nn
        >>> decayed, others = parameter_groups(nn.Linear(2, 3), weight_decay=0.1)
        >>> [p.shape for p in decayed["params"]], others["weight_decay"]
        ([torch.Size([3, 2])], 0.0)
    """
    added = set(no_decay(model))
    named = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    plain = [p for name, p in named.items() if p.ndim < 2 or name in added]
    decayed = [p for name, p in named.items() if p.ndim >= 2 and name not in added]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
