"""NormFormer: a gain for each head, and norms after attention and inside the feed-forward layer.

Shleifer et al.: NormFormer: Improved Transformer Pretraining with Extra Normalization
(arXiv 2110.09456). The paper scales heads before the output projection; fairseq scales contiguous
slices of what comes out of it, for speed. Their outputs differ, ``placement`` names the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast, final

from torch import Tensor, nn

from stablekit.arguments import choice, flag, number, plugin_name
from stablekit.errors import AttachError
from stablekit_layers._blocks import recast
from stablekit_layers._families import stack_of
from stablekit_layers._gains import (
    Gain,
    fold_columns,
    fold_rows,
    put_after,
    put_before,
    refuse_computed,
    take_away,
    weight_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit_layers._families import Block

__all__ = ["NormFormer"]

_PLACEMENTS: Final = ("paper", "fairseq")


@final
class NormFormer:
    """Add NormFormer's three operations, and on request its fourth, to every pre-norm block.

    ``x <- x + LN_a(concat(gamma_h * head_h) W_O)``, then ``x <- r * x + W_2 LN_f(act(W_1 LN(x)))``;
    in a gated feed-forward layer ``LN_f`` acts on ``act(gate) * up``. Gains are 1 at first. The
    norms change the function the model computes; the gains alone do not.

    Args:
        head_scale: add ``gamma``, one factor a head. Alone it can be folded into ``W_O``.
        attention_norm: add ``LN_a``.
        ffn_norm: add ``LN_f``.
        residual_scale: add ``r``, one factor a feature; the paper does so in small models.
        placement: "paper" scales heads before ``W_O``, "fairseq" slices of its output.
        eps: of the two norms, which are LayerNorms.
        name: another name than "normformer", for a second catalogue entry.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or nothing is left to add.

    Example:
        >>> NormFormer(residual_scale=True).arguments["placement"]
        'paper'
    """

    conflicts = frozenset({"peri-ln", "hybridnorm", "hybridnorm-star"})

    def __init__(
        self,
        *,
        head_scale: bool = True,
        attention_norm: bool = True,
        ffn_norm: bool = True,
        residual_scale: bool = False,
        placement: str = "paper",
        eps: float = 1e-5,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.head_scale = flag("head_scale", head_scale)
        self.attention_norm = flag("attention_norm", attention_norm)
        self.ffn_norm = flag("ffn_norm", ffn_norm)
        self.residual_scale = flag("residual_scale", residual_scale)
        if not (head_scale or attention_norm or ffn_norm or residual_scale):
            raise ValueError("NormFormer has nothing to add: all four parts are False")
        self.placement = choice("placement", placement, _PLACEMENTS)
        self.eps = number("eps", eps, above=0)
        self.name = plugin_name(name, "normformer")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What makes an equal surgery."""
        return {
            "head_scale": self.head_scale,
            "attention_norm": self.attention_norm,
            "ffn_norm": self.ffn_norm,
            "residual_scale": self.residual_scale,
            "placement": self.placement,
            "eps": self.eps,
        }

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose blocks are not known."""
        for block in stack_of(model, self.name).blocks:
            if self.placement == "fairseq" and _width(block) % block.heads:
                raise AttachError(
                    f"placement='fairseq' cuts the output of {block.name}'s attention into"
                    f" {block.heads} slices, which {_width(block)} cannot be cut into"
                )

    def apply_to(self, model: nn.Module) -> None:
        """Add modules and hooks to every block."""
        for block in stack_of(model, self.name).blocks:
            self._add_to_attention(block)
            if self.ffn_norm:
                block.mlp.mid_norm = self._norm(weight_of(block.mlp_out).shape[1], block.mlp_out)
                put_before(block.mlp_out, block.mlp.mid_norm)
            if self.residual_scale:
                gain = Gain(_width(block), like=weight_of(block.mlp_out))
                block.module.residual_norm = gain
                recast(block, scaled_residual)

    def check_fold(self, model: nn.Module) -> None:
        """Refuse norms and residual gains, which no weight can hold."""
        del model
        kept = [k for k in ("attention_norm", "ffn_norm", "residual_scale") if getattr(self, k)]
        if kept:
            raise AttachError(
                f"{self.name} cannot be folded: no weight computes its {', '.join(kept)}"
            )

    def fold(self, model: nn.Module) -> None:
        """Compute the gains of heads into ``W_O`` and remove them."""
        into = fold_columns if self.placement == "paper" else fold_rows
        blocks = stack_of(model, self.name).blocks
        refuse_computed([block.attention_out for block in blocks])
        for block in blocks:
            gain = cast("Gain", block.attention.head_norm)
            into(block.attention_out, gain.weight)
            take_away(block.attention_out, gain)
            del block.attention.head_norm

    def _add_to_attention(self, block: Block) -> None:
        out, attention = block.attention_out, block.attention
        if self.head_scale:
            # Trainer decays what has no name like a norm's.
            attention.head_norm = Gain(block.heads, like=weight_of(out))
            put = put_before if self.placement == "paper" else put_after
            put(out, attention.head_norm)
        if self.attention_norm:
            attention.out_norm = self._norm(_width(block), out)
            put_after(out, attention.out_norm)

    def _norm(self, width: int, beside: nn.Module) -> nn.LayerNorm:
        like = weight_of(beside)
        return nn.LayerNorm(width, self.eps, device=like.device, dtype=like.dtype)


def scaled_residual(block: nn.Module, hidden: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    """Return ``r * hidden + mlp(norm(hidden))``."""
    made = mlp(norm(hidden))
    # After the MLP, so that gradients are added in the order in which they are without a gain.
    return cast("Tensor", cast("Gain", block.residual_norm)(hidden) + made)


def _width(block: Block) -> int:
    return weight_of(block.attention_out).shape[0]
