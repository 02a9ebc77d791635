"""AttentionMonitor records the largest attention logit of every layer, or a bound on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import _scores
from stablekit_monitors import AttentionMonitor
from stablekit_monitors.attention_monitor import largest_logit, logit_bound
from tests.monitors.watched import HEADS, WIDTH, Run, Transformer, outputs_of

QK: dict[str, Any] = {
    "query": "blocks.*.attn.wq",
    "key": "blocks.*.attn.wk",
    "head_dim": WIDTH // HEADS,
}


def by_loop(
    query: Tensor, key: Tensor, allowed: Tensor | None, scale: float, added: Tensor | None = None
) -> float:
    """Return the largest logit, pair by pair, in double precision."""
    best, group = -math.inf, query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                for j in range(key.shape[2]):
                    if allowed is None or allowed[b, i, j]:
                        q, k = query[b, h, i].double(), key[b, h // group, j].double()
                        more = 0.0 if added is None else float(added[b, i, j])
                        best = max(best, float(q @ k) * scale + more)
    return best


def heads_of(x: Tensor) -> Tensor:
    parts: Tensor = x.unflatten(-1, (HEADS, -1))
    return parts.transpose(1, 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_exact_logits_are_those_of_the_pairs_that_attend() -> None:
    names = [f"blocks.{i}.attn.{which}" for i in range(2) for which in ("wq", "wk")]
    seen = [torch.cat(both) for both in outputs_of(Transformer(), names, 4, 5)]
    causal = torch.ones(6, 5, 5).tril()
    run = Run(AttentionMonitor(1, mode="exact", layers="blocks.*.attn"))
    metrics = run.step(4, 5)
    found = [metrics[f"attention-monitor/blocks.{i}.attn"] for i in range(2)]
    expected = [
        by_loop(heads_of(seen[2 * i]), heads_of(seen[2 * i + 1]), causal, (WIDTH // HEADS) ** -0.5)
        for i in range(2)
    ]
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics["attention-monitor/largest"] == max(found)


def test_the_bound_multiplies_the_longest_query_and_key_of_a_head() -> None:
    names = [f"blocks.{i}.attn.{which}" for i in range(2) for which in ("wq", "wk")]
    seen = [torch.cat(both) for both in outputs_of(Transformer(), names, 4, 5)]
    metrics = Run(AttentionMonitor(1, **QK)).step(4, 5)
    for i in range(2):
        query, key = (heads_of(x).norm(dim=-1).amax((0, 2)) for x in seen[2 * i : 2 * i + 2])
        expected = float((query * key).max()) * (WIDTH // HEADS) ** -0.5
        assert metrics[f"attention-monitor/blocks.{i}.attn.wq"] == pytest.approx(expected)


@given(st.integers(0, 10**6))
def test_no_logit_exceeds_the_bound(seed: int) -> None:
    query, key = random(2, 4, 5, 3, seed=seed), random(2, 2, 5, 3, seed=seed + 1)
    norms = query.norm(dim=-1).amax((0, 2)), key.norm(dim=-1).amax((0, 2)).repeat_interleave(2)
    assert largest_logit(query, key, scale=0.7) <= logit_bound(*norms) * 0.7 * (1 + 1e-5)


def test_two_modes_may_be_attached_together() -> None:
    exact = AttentionMonitor(1, mode="exact", layers="blocks.*.attn", name="exact")
    metrics = Run(AttentionMonitor(1, **QK), exact).step()
    assert metrics["exact/largest"] <= metrics["attention-monitor/largest"]


PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
@pytest.mark.parametrize("kind", ["bool", "float", "low float"])
def test_masked_pairs_and_padding_queries_do_not_count(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scores, "_AT_ONCE", at_once)
    query, key = random(3, 4, 5, 6), random(3, 2, 5, 6, seed=1)
    query[1, 0, 3:], key[2, 0, 0] = 1000.0, 1000.0  # padding, to the right and to the left
    mask = PADDED[:, None, :] & torch.ones(5, 5).tril().bool()
    lowest = -math.inf if kind == "float" else torch.finfo(torch.float32).min
    given = mask if kind == "bool" else torch.zeros(3, 5, 5).masked_fill(~mask, lowest)
    expected = by_loop(query, key, mask & PADDED[:, :, None], 0.4)
    found = largest_logit(query, key, given[:, None], scale=0.4)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_bias_that_is_added_counts() -> None:
    query, key, bias = random(1, 1, 4, 2), random(1, 1, 4, 2, seed=1), random(1, 4, 4, seed=2)
    expected = by_loop(query, key, None, 2**-0.5, added=bias)
    assert largest_logit(query, key, bias[:, None]).item() == pytest.approx(expected, rel=1e-5)


def test_bf16_logits_are_multiplied_in_float32_also_under_autocast() -> None:
    query, key = random(1, 1, 7, 64).bfloat16(), random(1, 1, 7, 64, seed=1).bfloat16()
    expected = by_loop(query, key, None, 0.125)
    with torch.autocast("cpu", torch.bfloat16):
        found = largest_logit(query, key)
    assert found.item() == pytest.approx(expected, rel=1e-5)


class Written(nn.Module):
    """Attention whose softmax is written out, with an additive mask and padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wq, self.wk = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fails = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        logits = self.wq(x) @ self.wk(x).mT / 2 + mask
        if self.fails:
            raise RuntimeError("out of memory")
        return nn.functional.softmax(logits, dim=-1) @ x


def test_a_softmax_that_is_written_out_is_seen() -> None:
    model = nn.ModuleDict({"attn": Written()})
    run = Run(AttentionMonitor(1, mode="exact", layers="attn"), model=model)
    x = random(3, 5, 4)
    mask = PADDED[:, None, :] & torch.ones(5, 5).tril().bool()
    added = torch.zeros(3, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    model["attn"](x, added).sum().backward()
    attention: Any = model["attn"]
    query, key = attention.wq(x).detach()[:, None], attention.wk(x).detach()[:, None]
    run.optimizer.step()
    expected = by_loop(query, key, mask & PADDED[:, :, None], 0.5)
    assert run.metrics()["attention-monitor/attn"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_left_on_when_attention_raises() -> None:
    attention = Written()
    run = Run(
        AttentionMonitor(1, mode="exact", layers="attn"), model=nn.ModuleDict({"attn": attention})
    )
    attention.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run.model["attn"](random(1, 2, 4), torch.zeros(2, 2))
    assert torch._C._len_torch_function_stack() == 0


def test_fewer_key_heads_than_query_heads_are_shared_out() -> None:
    model = nn.ModuleDict({"wq": nn.Linear(4, 8), "wk": nn.Linear(4, 4)})
    x = random(2, 5, 4)
    run = Run(AttentionMonitor(1, query="wq", key="wk", head_dim=2, scale=1.0), model=model)
    query, key = model["wq"](x), model["wk"](x)
    (query.sum() + key.sum()).backward()
    run.optimizer.step()
    heads = query.detach().unflatten(-1, (4, 2)), key.detach().unflatten(-1, (2, 2))
    longest = [one.norm(dim=-1).amax((0, 1)) for one in heads]
    expected = max(float(longest[0][h] * longest[1][h // 2]) for h in range(4))
    assert run.metrics()["attention-monitor/wq"] == pytest.approx(expected, rel=1e-6)


def test_an_unknown_model_is_refused_with_what_to_do() -> None:
    class MyAttention(nn.Linear):
        """Attention that nobody knows."""

    model = nn.ModuleDict({"attn": MyAttention(4, 2), "other": nn.MultiheadAttention(4, 2)})
    for mode in ("bound", "exact"):
        expected = r"here are MultiheadAttention, MyAttention.*Name the modules"
        with pytest.raises(AttachError, match=expected):
            Run(AttentionMonitor(mode=mode), model=model)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "exact"},
        {"mode": "exact", "layers": "blocks.*"},
        {"mode": "exact", "layers": "blocks.*.self_attn"},
        {"query": "blocks.*.self_attn", "key": "blocks.*.self_attn"},
        {"query": "blocks.*.linear1", "key": "blocks.*.self_attn.out_proj"},
    ],
    ids=str,
)
def test_torchs_own_attention_is_refused_for_what_cannot_be_seen_of_it(
    arguments: dict[str, Any],
) -> None:
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with pytest.raises(
        AttachError, match=r"blocks\.0\.self_attn is torch's nn\.MultiheadAttention"
    ):
        Run(AttentionMonitor(**arguments), model=model)


def test_attention_of_ones_own_that_inherits_from_torchs_is_looked_at() -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # its own
            return nn.functional.scaled_dot_product_attention(x, 2 * x, x)

    model = Attention(2, 1)
    run = Run(AttentionMonitor(1, mode="exact", layers=""), model=model)
    assert run.session is not None
    x = torch.tensor([[[[1.0, 0.0], [0.0, 3.0]]]], requires_grad=True)
    model(x).sum().backward()
    run.optimizer.step()
    largest = run.metrics()["attention-monitor/largest"]
    assert largest == pytest.approx(18 / 2**0.5, rel=1e-6)


def test_queries_without_keys_are_refused() -> None:
    with pytest.raises(AttachError, match=r"matches 2, key='blocks\.0\.attn\.wk' matches 1"):
        Run(AttentionMonitor(query="blocks.*.attn.wq", key="blocks.0.attn.wk"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "guess"}, "mode must be one of"),
        ({"query": "a"}, "name both"),
        ({"head_dim": 4}, "go with query="),
        ({"query": "a", "key": "b", "mode": "exact"}, "takes layers="),
        ({"layers": "a"}, "takes query="),
        ({"query": "a", "key": "b", "scale": 0.0}, "scale must be"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        AttentionMonitor(**arguments)
