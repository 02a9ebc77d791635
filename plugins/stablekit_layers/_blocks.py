"""Blocks whose feed-forward half is computed in another way than their class does.

Hooks could only add ``n - h`` to the output, which rounds with the size of ``h``: by 2.0 in
bfloat16 where ``h`` is 200 and ``n`` of size 1. So the block becomes an instance of a subclass of
its own class, which transformers and FSDP2 treat as they treat the class: gradient checkpointing
wraps its forward, hidden states are recorded of it, its name is the same.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from stablekit_layers._families import Block

__all__ = ["recast"]


FeedForward: TypeAlias = "Callable[[nn.Module, Tensor, nn.Module, nn.Module], Tensor]"
"""The output of a block from itself, what attention was added to, the norm and the MLP: a function
of a module, so that it can be pickled."""


def _llama(
    self: Any,  # noqa: ANN401 - a block of transformers
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: object = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: object,
) -> Tensor:
    made = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden = hidden_states + made[0]
    return cast("Tensor", self.feed_forward(hidden, self.post_attention_layernorm, self.mlp))


def _gpt2(
    self: Any,  # noqa: ANN401 - a block of transformers
    hidden_states: Tensor,
    past_key_values: object = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    use_cache: bool | None = False,
    **kwargs: object,
) -> Tensor:
    if encoder_hidden_states is not None:
        raise ValueError("this GPT-2 block has no cross attention, got encoder_hidden_states")
    made = self.attn(
        self.ln_1(hidden_states),
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        use_cache=use_cache,
        **kwargs,
    )
    return cast("Tensor", self.feed_forward(made[0] + hidden_states, self.ln_2, self.mlp))


def recast(block: Block, feed_forward: FeedForward) -> None:
    """Let a block of transformers compute its second half with ``feed_forward``."""
    forward = _gpt2 if block.is_fused else _llama
    kind: Any = type(block.module)  # to mypy a class of modules is not hashable
    block.module.__class__ = _recast(kind, forward, feed_forward)


@cache
def _recast(
    kind: type[Any], forward: Callable[..., Tensor], feed_forward: FeedForward
) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        del protocol
        return _empty, (kind, forward, feed_forward), self.__dict__

    body = {
        "forward": forward,
        "feed_forward": feed_forward,
        # pickle and deepcopy would look for this class by its name, and find the one it is made of
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), body)


def _empty(
    kind: Any,  # noqa: ANN401 - as above
    forward: Callable[..., Tensor],
    feed_forward: FeedForward,
) -> nn.Module:
    """Return a block without anything in it, which pickle and deepcopy fill."""
    made = _recast(kind, forward, feed_forward)
    return made.__new__(made)
