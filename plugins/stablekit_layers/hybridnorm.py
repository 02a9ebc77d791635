"""HybridNorm: norms of queries, keys and values, and a post-norm feed-forward layer.

Zhuo et al.: HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization
(arXiv 2503.04598). As in the authors' code, gains of length ``head_dim`` are shared by all heads,
values have one too, and the feed-forward layer is added to the normed value, not to its input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

from torch import Tensor, nn

from stablekit.arguments import number, plugin_name
from stablekit.errors import AttachError
from stablekit_layers._blocks import recast
from stablekit_layers._families import stack_of
from stablekit_layers.norms import NormalisedOutput, like

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit_layers._families import Block

__all__ = ["HybridNorm", "HybridNormStar"]

_CONFLICTS = frozenset({"qk-norm", "peri-ln", "normformer", "hybridnorm", "hybridnorm-star"})


@final
class HybridNorm:
    """Normalise queries, keys and values instead of their input, and what the MLP is added to.

    ``y = x + attention(rms(q), rms(k), rms(v)) W_O`` without a norm of ``x``; ``n = norm(y)``;
    ``x = n + mlp(n)``. RoPE comes after the norms of queries and keys, the last norm of the model
    stays. From scratch only: no other model computes the same, and it cannot be folded.

    LLaMA, Mistral and Qwen2, GPT-2, and Qwen3, whose own norms of queries and keys are kept.

    Args:
        eps: of the norms of queries, keys and values that are added.
        name: another name than "hybridnorm", for a second catalogue entry.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``eps`` is not above 0.

    Example:
        >>> HybridNorm().arguments
        {'eps': 1e-05}
    """

    conflicts = _CONFLICTS

    def __init__(self, eps: float = 1e-5, *, name: str | None = None) -> None:
        """Check the arguments."""
        self.eps = number("eps", eps, above=0)
        self.name = plugin_name(name, "hybridnorm")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What makes an equal surgery."""
        return {"eps": self.eps}

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose blocks are not known, or that has some of these norms."""
        _check(model, self.name)

    def apply_to(self, model: nn.Module) -> None:
        """Change every block."""
        for block in stack_of(model, self.name).blocks:
            _normalise(block, self.eps)
            _post_norm(block)


@final
class HybridNormStar:
    """HybridNorm* : HybridNorm whose first block keeps its norms before attention and MLP.

    In the first block ``y = x + attention(norm(x))`` with normed queries, keys and values, and
    ``x = y + mlp(norm(y))``; the others are those of :class:`HybridNorm`.

    Args:
        eps: of the norms of queries, keys and values that are added.
        name: another name than "hybridnorm-star", for a second catalogue entry.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``eps`` is not above 0.

    Example:
        >>> HybridNormStar(1e-6).arguments
        {'eps': 1e-06}
    """

    conflicts = _CONFLICTS

    def __init__(self, eps: float = 1e-5, *, name: str | None = None) -> None:
        """Check the arguments."""
        self.eps = number("eps", eps, above=0)
        self.name = plugin_name(name, "hybridnorm-star")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What makes an equal surgery."""
        return {"eps": self.eps}

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose blocks are not known, or that has some of these norms."""
        _check(model, self.name)

    def apply_to(self, model: nn.Module) -> None:
        """Change every block, the first one less."""
        for i, block in enumerate(stack_of(model, self.name).blocks):
            _normalise(block, self.eps)
            if i > 0:
                _post_norm(block)


def post_norm(block: nn.Module, hidden: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    """Return ``n + mlp(n)`` with ``n = norm(hidden)``."""
    del block
    n: Tensor = norm(hidden)
    return cast("Tensor", n + mlp(n))


def _check(model: nn.Module, name: str) -> None:
    for block in stack_of(model, name).blocks:
        if hasattr(block.attention, "q_norm") != block.has_qk_norm:
            raise AttachError(
                f"{block.name} normalises queries in a way that {name} does not know: it takes"
                " models without such norms, or Qwen3"
            )


def _normalise(block: Block, eps: float) -> None:
    queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
    wanted = {"v_norm": block.value}
    if not block.has_qk_norm:
        wanted = {"q_norm": block.query, "k_norm": block.key, **wanted}
    for key, made_by in wanted.items():
        block.attention.add_module(key, like(made_by, block.head_dim, eps=eps))
    norms = [block.attention.get_submodule(key) for key in wanted]
    if block.is_fused:
        parts = list(zip(norms, (queries, keys, keys), strict=True))
        block.query.register_forward_hook(NormalisedOutput([*parts]))
    else:
        for norm, (key, made_by) in zip(norms, wanted.items(), strict=True):
            length = queries if key == "q_norm" else keys
            made_by.register_forward_hook(NormalisedOutput([(norm, length)]))


def _post_norm(block: Block) -> None:
    setattr(block.module, block.attention_norm, nn.Identity())
    recast(block, post_norm)
