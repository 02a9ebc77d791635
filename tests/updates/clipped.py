"""What the tests of QKClip share: a transformer with large logits, and what these are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.monitors.watched import HEADS, WIDTH, Transformer

NAMED: dict[str, Any] = {
    "query": "blocks.*.attn.wq",
    "key": "blocks.*.attn.wk",
    "head_dim": WIDTH // HEADS,
}
EXACT: dict[str, Any] = {**NAMED, "layers": "blocks.*.attn"}
KINDS: dict[str, dict[str, Any]] = {"exact": EXACT, "bound": {**NAMED, "logits": "bound"}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def still(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - as torch
    """Return an optimizer that moves nothing."""
    return torch.optim.SGD(params, lr=0.0)


def logits_of(model: Any, words_: Tensor) -> list[Tensor]:  # noqa: ANN401 - the small transformer
    """Return causal logits ``[batch, heads, T, T]`` of each block in float64, -inf where masked."""
    found, x = [], model.embed(words_)
    for block in model.blocks:
        made = (layer(x).double() for layer in (block.attn.wq, block.attn.wk))
        query, key = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in made)
        causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        logits = query @ key.mT * (WIDTH // HEADS) ** -0.5
        found.append(logits.masked_fill(~causal, -math.inf).detach())
        x = block(x)
    return found


def maxima(logits: Tensor) -> Tensor:
    """Return the largest of each head."""
    return logits.amax((0, 2, 3))


def loud(factor: float = 4.0) -> Transformer:
    """Return a transformer with logits of some size."""
    model = Transformer()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.wq.weight.mul_(factor)  # type: ignore[union-attr,operator]
            block.attn.wk.weight.mul_(factor)  # type: ignore[union-attr,operator]
    return model


class Plus(nn.Module):
    """A norm that keeps its gain as the difference from 1."""

    def __init__(self, root: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        gain = (1 + self.weight) if not self.root else self.weight.abs().sqrt() + 2
        return nn.functional.rms_norm(x, (4,)) * gain
