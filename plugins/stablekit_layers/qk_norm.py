"""Normalising queries and keys before their products are taken.

Dehghani et al.: Scaling Vision Transformers to 22 Billion Parameters (arXiv 2302.05442); Wortsman
et al.: Small-scale proxies for large-scale Transformer training instabilities (arXiv 2309.14322),
where it cures the growth of attention logits at high learning rates. ViT-22B takes LayerNorm
without bias for each head; here it is RMSNorm, as in Qwen3 (per head) and OLMo 2 (per projection).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.arguments import choice, number, plugin_name
from stablekit.errors import AttachError
from stablekit_layers._families import Block, stack_of
from stablekit_layers.norms import NormalisedOutput, like

if TYPE_CHECKING:
    from torch import nn

__all__ = ["QKNorm"]


@final
class QKNorm:
    """Divide every query and key by its root mean square, times a learned gain, before RoPE.

    With ``hd`` the length of a head: ``q = g_q * q / sqrt(mean(q ** 2) + eps)``, likewise k, so
    that a logit ``q . k / sqrt(hd)`` is at most ``sqrt(hd) * max|g_q| * max|g_k|``. One gain of
    length hd for all heads of a layer (``per="head"``: what Qwen3 computes, under its names
    ``q_norm`` and ``k_norm``), or one root mean square and gain over the whole projection
    (``per="projection"``: OLMo 2).

    Not function preserving: for training from scratch, or for a model that is trained on. Folds
    into nothing. The scale of ``W_q`` and ``W_k`` no longer matters, so weight decay on them acts
    as a schedule of their learning rate.

    LLaMA, Mistral and Qwen2 (hooks on ``q_proj`` and ``k_proj``), GPT-2 (on ``c_attn``, its first
    two thirds). Qwen3, OLMo 2 and Gemma 3 have it and are refused.

    Args:
        eps: added to the mean square.
        per: "head" or "projection".
        name: another name than "qk-norm", for a second catalogue entry.

    Example:
        >>> QKNorm(1e-5).arguments
        {'eps': 1e-05, 'per': 'head'}
    """

    conflicts = frozenset({"hybridnorm", "hybridnorm-star"})

    def __init__(self, eps: float = 1e-6, *, per: str = "head", name: str | None = None) -> None:
        self.name = plugin_name(name, "qk-norm")
        self.eps = number("eps", eps, above=0)
        self.per = choice("per", per, ("head", "projection"))

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that make an equal surgery."""
        return {"eps": self.eps, "per": self.per}

    def check(self, model: nn.Module) -> None:
        """Raise if the model has norms of queries and keys, or is of no family that is known.

        Raises:
            AttachError: So it is.
        """
        for block in stack_of(model, self.name).blocks:
            if hasattr(block.attention, "q_norm") or hasattr(block.attention, "k_norm"):
                raise AttachError(
                    f"{type(block.attention).__name__} normalises queries and keys already:"
                    f" {self.name} would do it twice"
                )

    def apply_to(self, model: nn.Module) -> None:
        """Add ``q_norm`` and ``k_norm`` to every attention layer."""
        for block in stack_of(model, self.name).blocks:
            self._operate(block)

    def _operate(self, block: Block) -> None:
        queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
        is_per_head = self.per == "head"
        q_norm = like(block.query, block.head_dim if is_per_head else queries, eps=self.eps)
        k_norm = like(block.key, block.head_dim if is_per_head else keys, eps=self.eps)
        block.attention.add_module("q_norm", q_norm)
        block.attention.add_module("k_norm", k_norm)
        if block.is_fused:
            parts = [(q_norm, queries), (k_norm, keys), (None, keys)]
            block.query.register_forward_hook(NormalisedOutput(parts))
        else:
            block.query.register_forward_hook(NormalisedOutput([(q_norm, queries)]))
            block.key.register_forward_hook(NormalisedOutput([(k_norm, keys)]))
