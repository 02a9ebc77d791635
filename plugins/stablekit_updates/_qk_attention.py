"""Which attention layers of a model are clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit.errors import AttachError
from stablekit.forward import known_layers, modules, named_layers

if TYPE_CHECKING:
    from torch import nn

    from stablekit import Session
    from stablekit.forward import AttentionLayer

__all__ = ["attention_of", "refuse_compiled"]


def attention_of(
    model: nn.Module,
    query: str | None,
    key: str | None,
    layers: str | None,
    *,
    head_dim: int | None,
    scale: float | None,
    is_fused: bool,
) -> dict[AttentionLayer, nn.Module]:
    """Return layers with the modules that compute their attention; arguments as of QKClip.

    Raises:
        AttachError: There is none, or they cannot be clipped.
    """
    if query is None or key is None:
        _refuse_latent(model)
        known = known_layers(model)
        _refuse_normed(known)
        return known
    made = named_layers(model, query, key, head_dim=head_dim, scale=scale, is_fused=is_fused)
    if layers is None:
        return {layer: layer.query for layer in made}
    found = modules.matching(model, layers, argument="layers")
    if len(found) != len(made):
        raise AttachError(
            f"every attention module needs one of queries: layers={layers!r} matches {len(found)},"
            f" query={query!r} matches {len(made)}"
        )
    return dict(zip(made, found.values(), strict=True))


def refuse_compiled(session: Session) -> None:
    """Refuse a model whose logits cannot be seen.

    Raises:
        AttachError: It is compiled.
    """
    if session.model is not None and modules.is_compiled(session.model):
        raise AttachError(
            "exact logits cannot be seen inside torch.compile; use QKClip(logits='bound')"
        )


def _refuse_latent(model: nn.Module) -> None:
    for name, module in modules.named(model).items():
        if hasattr(module, "kv_b_proj") or hasattr(module, "kv_a_proj_with_mqa"):
            raise AttachError(
                f"{name} is multi-head latent attention, whose rotary part must be scaled in"
                " another way; qk-clip does not support it"
            )


def _refuse_normed(known: dict[AttentionLayer, nn.Module]) -> None:
    """Refuse norms of queries and keys that take back what is done to a fused projection."""
    for layer, module in known.items():
        if layer.is_fused and hasattr(module, "q_norm"):
            raise AttachError(
                f"{layer.name} normalises queries and keys after the projection that makes both, so"
                " that scaling it changes no logit; qk-norm bounds them already"
            )
