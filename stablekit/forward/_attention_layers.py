"""Finding the attention layers of a model, and where their queries and keys come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from torch import nn

from stablekit.errors import AttachError
from stablekit.forward import modules

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AttentionLayer",
    "known_layers",
    "named_layers",
    "refuse_opaque",
    "rope_gain",
    "ropes_in",
]

_SPLIT = frozenset(
    f"{family}Attention"
    for family in (
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Llama",
        "Mistral",
        "Mixtral",
        "Olmo2",
        "Qwen2",
        "Qwen2Moe",
        "Qwen3",
        "Qwen3Moe",
        "SmolLM3",
    )
)
_FUSED = frozenset({"GPT2Attention"})
_FAMILIES = "LLaMA, Mistral, Mixtral, Qwen2, Qwen3, Gemma 1 to 3, OLMo 2, SmolLM3 and GPT-2"


@final
@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer whose logits are ``scale * q . k``, RoPE or not.

    Example:
        >>> made = nn.Linear(8, 24)
        >>> AttentionLayer("attn", made, made, 2, 4, None, is_fused=True).heads
        2
    """

    name: str
    """Name of the attention module."""
    query: nn.Module
    """The module whose output is the queries, before RoPE."""
    key: nn.Module
    """Likewise the keys; the same module where queries, keys and values come out as one."""
    heads: int
    """How many query heads; 1 if they cannot be told apart."""
    head_dim: int | None
    """Length of one query; None is all of the last dim."""
    scale: float | None
    """What logits are multiplied by; None is ``length of a query ** -0.5``."""
    is_fused: bool = False
    """Whether the output is queries, keys and values, in this order."""


def known_layers(model: nn.Module) -> dict[AttentionLayer, nn.Module]:
    """Return the layers of the transformers families that are known to compute plain logits.

    Raises:
        AttachError: There is none.

    Example:
        >>> known_layers(nn.Linear(4, 2))
        Traceback (most recent call last):
            ...
        stablekit.errors.AttachError: no attention layer that is known was found in ...
    """
    by_name = modules.named(model)
    found = {_layer(name, module): module for name, module in by_name.items() if _is_known(module)}
    if not found:
        seen = {type(m).__name__ for m in by_name.values() if "Attention" in type(m).__name__}
        if seen == {nn.MultiheadAttention.__name__}:
            refuse_opaque(model)
        raise AttachError(
            f"no attention layer that is known was found in {type(model).__name__}; known are those"
            f" of {_FAMILIES} in transformers, here are {', '.join(sorted(seen)) or 'none'}. Name"
            " the modules that make queries and keys, as in query='blocks.*.wq', key='blocks.*.wk',"
            " head_dim=64"
        )
    return found


def named_layers(
    model: nn.Module,
    query: str,
    key: str,
    *,
    head_dim: int | None = None,
    scale: float | None = None,
    is_fused: bool = False,
) -> list[AttentionLayer]:
    """Return attention layers whose queries and keys are made by modules with these names.

    Args:
        model: what they are in.
        query: name of the modules whose outputs are queries, in which ``*`` stands for one part.
        key: likewise of those that make keys, as many and in the same order.
        head_dim: length of a query; None takes the whole output for one head.
        scale: what products are multiplied by; None is ``length of a query ** -0.5``.
        is_fused: whether these outputs are queries, keys and values, in this order.

    Raises:
        AttachError: There is none, or not as many of queries as of keys, or it is torch's
            ``MultiheadAttention``.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"wq": nn.Linear(2, 8), "wk": nn.Linear(2, 4)})
        >>> [layer] = named_layers(model, "wq", "wk", head_dim=2)
        >>> layer.name, layer.heads
        ('wq', 4)
    """
    queries = modules.matching(model, query, argument="query")
    keys = modules.matching(model, key, argument="key")
    for name in (*queries, *keys):
        refuse_opaque(model, name)
    if len(queries) != len(keys):
        raise AttachError(
            f"every module of queries needs one of keys: query={query!r} matches"
            f" {len(queries)}, key={key!r} matches {len(keys)}"
        )
    return [
        AttentionLayer(
            name=name,
            query=made,
            key=other,
            heads=_heads(made, head_dim, parts=3 if is_fused else 1),
            head_dim=head_dim,
            scale=scale,
            is_fused=is_fused,
        )
        for (name, made), other in zip(queries.items(), keys.values(), strict=True)
    ]


def refuse_opaque(model: nn.Module, name: str = "") -> None:
    """Refuse to look into torch's own attention, which shows neither queries nor logits.

    It hands the weights of its projections to one function, in which it is not seen what it calls.

    Args:
        model: what the module is in.
        name: of a module that is, is in, or contains such attention; "" for the model.

    Raises:
        AttachError: It is.
    """
    for other, module in modules.named(model).items():
        is_opaque = getattr(type(module), "forward", None) is nn.MultiheadAttention.forward
        if is_opaque and (_is_part(other, name) or _is_part(name, other)):
            raise AttachError(
                f"{other or 'the model'} is torch's nn.MultiheadAttention, which computes queries,"
                " keys and logits within one function, where they cannot be seen. Make queries and"
                " keys with linear layers of their own and call"
                " torch.nn.functional.scaled_dot_product_attention in the module"
            )


def _is_part(name: str, of: str) -> bool:
    return not of or name == of or name.startswith(f"{of}.")


def _heads(query: nn.Module, head_dim: int | None, *, parts: int) -> int:
    if head_dim is None:
        return 1
    return max(1, modules.width_of(query) // parts // head_dim)


def ropes_in(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the rotary embeddings of a model, with the attribute that tells what they add."""
    return [
        (module, key)
        for module in model.modules()
        for key, value in vars(module).items()
        if key.endswith("attention_scaling") and isinstance(value, (int, float))
    ]


def rope_gain(ropes: Sequence[tuple[nn.Module, str]]) -> float:
    """Return how much rotary embeddings lengthen queries and keys: more than 1 with YaRN."""
    return max((float(getattr(module, key)) for module, key in ropes), default=1.0)


def _is_known(module: nn.Module) -> bool:
    kind = _kind(module)
    is_crossing = getattr(module, "is_cross_attention", False)
    return kind in _SPLIT or (kind in _FUSED and not is_crossing)


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class in transformers, which FSDP2 replaces by another."""
    kinds = (k for k in type(module).__mro__ if k.__module__.startswith("transformers.models."))
    kind = next(kinds, None)
    return "" if kind is None else kind.__name__


def _layer(name: str, module: Any) -> AttentionLayer:  # noqa: ANN401 - an attention module of transformers
    is_fused = _kind(module) in _FUSED
    query = module.c_attn if is_fused else getattr(module, "q_norm", module.q_proj)
    key = module.c_attn if is_fused else getattr(module, "k_norm", module.k_proj)
    return AttentionLayer(
        name=name,
        query=query,
        key=key,
        heads=module.config.num_attention_heads,
        head_dim=module.head_dim,
        scale=float(module.scaling),
        is_fused=is_fused,
    )
