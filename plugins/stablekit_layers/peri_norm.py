"""Norms around every sublayer, before it and after it.

Kim et al.: Peri-LN: Revisiting Normalization Layer in the Transformer Architecture (arXiv
2502.02732); Gemma 2 calls it sandwich norm. The reference whose numbers this was compared with is
tim-lawson/skip-middle. Differences: its gates of sublayers are not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.arguments import flag, number, plugin_name
from stablekit.errors import AttachError
from stablekit_layers._families import stack_of
from stablekit_layers.norms import NormalisedInput, NormalisedOutput, like

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PeriNorm"]

_ATTENTION, _MLP = "attention_out_norm", "mlp_out_norm"


@final
class PeriNorm:
    """Normalise what attention and MLP put out before it is added: ``x + norm(f(norm(x)))``.

    To the norm that a pre-norm block has before each sublayer one is added after it, RMSNorm with
    a learned gain that is 1 at first, and one on the embeddings; the final norm is kept. The root
    mean square of every update of the residual stream is then that of the gain, so that the
    variance of the stream grows linearly with depth, not exponentially.

    Not function preserving: for training from scratch, or for a model that is trained on. Folds
    into nothing. The scale of ``W_O`` and of the MLP's last projection no longer matters, so weight
    decay on them acts as a schedule of their learning rate.

    LLaMA, Mistral, Qwen2, Qwen3 (hooks on ``o_proj`` and ``down_proj``), GPT-2 (on ``c_proj`` of
    attention and MLP, and before that of ``wte + wpe``, so that dropout comes after the norm).
    Gemma 2 and 3 have it and are refused.

    Args:
        eps: added to the mean square.
        embedding: whether the embeddings are normalised too, as in the paper; Gemma does not.
        name: another name than "peri-ln", for a second catalogue entry.

    Example:
        >>> PeriNorm(embedding=False).arguments
        {'eps': 1e-05, 'embedding': False}
    """

    conflicts = frozenset({"normformer", "hybridnorm", "hybridnorm-star"})

    def __init__(
        self, eps: float = 1e-5, *, embedding: bool = True, name: str | None = None
    ) -> None:
        self.name = plugin_name(name, "peri-ln")
        self.eps = number("eps", eps, above=0)
        self.embedding = flag("embedding", embedding)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that make an equal surgery."""
        return {"eps": self.eps, "embedding": self.embedding}

    def check(self, model: nn.Module) -> None:
        """Raise if the model is of no family that is known, or has norms of these names.

        Raises:
            AttachError: So it is.
        """
        for block in stack_of(model, self.name).blocks:
            if hasattr(block.module, _ATTENTION) or hasattr(block.module, _MLP):
                raise AttachError(f"{block.name} has norms after its sublayers already")

    def apply_to(self, model: nn.Module) -> None:
        """Add ``attention_out_norm`` and ``mlp_out_norm`` to every block, and the embedding's."""
        stack = stack_of(model, self.name)
        for block in stack.blocks:
            self._after(block.module, _ATTENTION, block.attention_out, stack.width)
            self._after(block.module, _MLP, block.mlp_out, stack.width)
        if self.embedding:
            norm = like(stack.embedding, stack.width, eps=self.eps)
            stack.holder.add_module("embedding_norm", norm)
            stack.entrance.register_forward_pre_hook(NormalisedInput(norm))

    def _after(self, owner: nn.Module, name: str, module: nn.Module, width: int) -> None:
        norm = like(module, width, eps=self.eps)
        owner.add_module(name, norm)
        module.register_forward_hook(NormalisedOutput([(norm, width)]))
