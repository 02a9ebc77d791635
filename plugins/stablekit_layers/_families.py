"""Where the blocks of a model are, and in them attention, MLP, projections and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from stablekit.errors import AttachError
from stablekit.forward import modules

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FAMILIES", "Block", "Stack", "stack_of"]

_LLAMA = frozenset(f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
_GPT2 = frozenset({"GPT2Block"})
FAMILIES = "LLaMA, Mistral, Qwen2, Qwen3 and GPT-2"
"""The families of transformers that surgeries on blocks know."""


@final
@dataclass(frozen=True)
class Block:
    """One pre-norm block ``x + attention(norm(x))``, ``x + mlp(norm(x))``."""

    name: str
    """As ``model.layers.0``."""
    module: nn.Module
    attention: nn.Module
    """Holds the projections; ``module.self_attn`` or ``module.attn``."""
    attention_norm: str
    """Attribute of the block: ``input_layernorm`` or ``ln_1``."""
    mlp: nn.Module
    mlp_norm: str
    """Attribute of the block: ``post_attention_layernorm`` or ``ln_2``."""
    attention_out: nn.Module
    """The projection ``W_O``: ``o_proj`` or ``c_proj``; its input is all heads, one by one."""
    mlp_out: nn.Module
    """The last projection of the MLP: ``down_proj`` or ``c_proj``."""
    query: nn.Module
    """Makes queries; where ``is_fused``, queries, keys and values, in this order."""
    key: nn.Module
    value: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    is_fused: bool
    """Whether query, key and value are one module (GPT-2's ``c_attn``)."""
    has_qk_norm: bool
    """Whether the family normalises queries and keys by itself (Qwen3)."""


@final
@dataclass(frozen=True)
class Stack:
    """A model of blocks."""

    blocks: list[Block]
    holder: nn.Module
    """What the embedding belongs to: ``model.model`` or ``model.transformer``."""
    embedding: nn.Module
    """Of tokens: ``embed_tokens`` or ``wte``."""
    entrance: nn.Module
    """What the embeddings go into: the first block, or the dropout before it (GPT-2)."""
    width: int


def stack_of(model: nn.Module, surgery: str) -> Stack:
    """Return the description of a model.

    Raises:
        AttachError: It is of no family that is known, or has cross attention.
    """
    named = modules.named(model)
    blocks = [_block(name, module) for name, module in named.items() if _kind(module)]
    if not blocks:
        raise AttachError(_unknown(model, named, surgery))
    if any(hasattr(block.module, "crossattention") for block in blocks):
        raise AttachError(f"{surgery} knows no cross attention, which this model has")
    stacks = {block.name.rpartition(".")[0]: None for block in blocks}
    if len(stacks) > 1:
        raise AttachError(
            f"{surgery} knows models with one stack of blocks; this one has {', '.join(stacks)}:"
            " operate on each model in it by itself"
        )
    holder: Any = named[blocks[0].name.rpartition(".")[0].rpartition(".")[0]]
    embedding = holder.wte if blocks[0].is_fused else holder.embed_tokens
    return Stack(
        blocks=blocks,
        holder=holder,
        embedding=embedding,
        entrance=holder.drop if blocks[0].is_fused else blocks[0].module,
        width=embedding.weight.shape[-1],
    )


def _kind(module: nn.Module) -> str:
    """Return the name of a block's class in transformers if it is known, subclasses included."""
    kinds = (k for k in type(module).__mro__ if k.__module__.startswith("transformers.models."))
    kind = next(kinds, None)
    return "" if kind is None or kind.__name__ not in _LLAMA | _GPT2 else kind.__name__


def _block(name: str, module: Any) -> Block:  # noqa: ANN401 - a block of transformers
    return _gpt2(name, module) if _kind(module) in _GPT2 else _llama(name, module)


def _llama(name: str, module: Any) -> Block:  # noqa: ANN401
    attention, head_dim = module.self_attn, module.self_attn.head_dim
    return Block(
        name=name,
        module=module,
        attention=attention,
        attention_norm="input_layernorm",
        mlp=module.mlp,
        mlp_norm="post_attention_layernorm",
        attention_out=attention.o_proj,
        mlp_out=module.mlp.down_proj,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
        head_dim=head_dim,
        is_fused=False,
        has_qk_norm=_kind(module).startswith("Qwen3"),
    )


def _gpt2(name: str, module: Any) -> Block:  # noqa: ANN401
    attention = module.attn
    return Block(
        name=name,
        module=module,
        attention=attention,
        attention_norm="ln_1",
        mlp=module.mlp,
        mlp_norm="ln_2",
        attention_out=attention.c_proj,
        mlp_out=module.mlp.c_proj,
        query=attention.c_attn,
        key=attention.c_attn,
        value=attention.c_attn,
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        head_dim=attention.head_dim,
        is_fused=True,
        has_qk_norm=False,
    )


def _unknown(model: nn.Module, named: dict[str, nn.Module], surgery: str) -> str:
    seen = {
        type(m).__name__ for m in named.values() if type(m).__name__.endswith(("Layer", "Block"))
    }
    found = ", ".join(sorted(seen)) or "none"
    has_norms = any(name.startswith(_WITH_NORMS) for name in seen)
    own = (
        "; they have norms of queries, keys or sublayer outputs by themselves" if has_norms else ""
    )
    return (
        f"{surgery} knows the blocks of {FAMILIES} in transformers; {type(model).__name__} has none"
        f" of them (blocks found: {found}){own}"
    )


_WITH_NORMS = ("Gemma2", "Gemma3", "Olmo2")
