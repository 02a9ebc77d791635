"""The largest logits of every head, wherever attention is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit.forward import ExactLogits, Sampling, largest_logits, modules, named_layers


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def by_loop(query: Tensor, key: Tensor, *, is_causal: bool, scale: float) -> list[float]:
    """Return the largest of each head, pair by pair, in double precision."""
    group, best = query.shape[1] // key.shape[1], [-math.inf] * query.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                for j in range(i + 1 if is_causal else key.shape[2]):
                    pair = query[b, h, i].double() @ key[b, h // group, j].double()
                    best[h] = max(best[h], float(pair) * scale)
    return best


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_head_has_a_maximum_of_its_own(is_causal: bool) -> None:
    query, key = drawn(2, 4, 5, 3), drawn(2, 2, 5, 3, seed=1)
    found = largest_logits(query, key, is_causal=is_causal, scale=0.7)
    assert found.tolist() == pytest.approx(by_loop(query, key, is_causal=is_causal, scale=0.7))


class Attention(nn.Module):
    """Attention of three heads on queries and keys that are given, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if self.way == "sdpa":
            return nn.functional.scaled_dot_product_attention(query, key, key)
        if self.way == "softmax":
            return nn.functional.softmax(query @ key.mT * 2**-0.5, dim=-1) @ key
        one = query.flatten(0, 1), key.flatten(0, 1)  # heads within the batch
        return nn.functional.scaled_dot_product_attention(*one, one[1])


def seen(way: str, heads: int | None) -> list[float]:
    """Return what is seen of one forward pass."""
    model, sampling = Attention(way), Sampling(every=1)
    kept = None if heads is None else [heads]
    exact = ExactLogits(model, {"attn": model}, sampling, kept)
    sampling.attach(stablekit.attach(torch.optim.SGD(model.parameters(), lr=0.1)))
    model(drawn(2, 3, 5, 2), drawn(2, 3, 5, 2, seed=1))
    found: list[float] = exact.take(reduce=False)[0].tolist()
    return found


@pytest.mark.parametrize("way", ["sdpa", "softmax"])
def test_heads_are_kept_apart_if_asked_to(way: str) -> None:
    heads = by_loop(drawn(2, 3, 5, 2), drawn(2, 3, 5, 2, seed=1), is_causal=False, scale=2**-0.5)
    assert seen(way, 3) == pytest.approx(heads, rel=1e-5)
    assert seen(way, None) == seen(way, 1) == pytest.approx([max(heads)], rel=1e-5)


def test_attention_without_a_dim_of_heads_has_one() -> None:
    heads = by_loop(drawn(2, 3, 5, 2), drawn(2, 3, 5, 2, seed=1), is_causal=False, scale=2**-0.5)
    assert seen("within the batch", 1) == pytest.approx([max(heads)], rel=1e-5)
    with pytest.raises(AttachError, match="of 3 heads computes 1"):
        seen("within the batch", 3)


def test_heads_are_counted_at_the_end_of_a_sequence_of_modules() -> None:
    side = nn.Sequential(nn.Linear(2, 12), nn.LayerNorm(12))
    (layer,) = named_layers(nn.ModuleDict({"q": side}), "q", "q", head_dim=4)
    assert layer.heads == 3
    assert modules.width_of(nn.Tanh()) == 0


def test_a_compiled_part_makes_a_model_compiled() -> None:
    part = nn.Linear(2, 2)
    model = nn.Sequential(part)
    assert not modules.is_compiled(model)
    part.compile(backend="eager")
    assert modules.is_compiled(model)
