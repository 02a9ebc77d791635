"""QKClip brings the largest attention logit of every head down to the threshold, exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stablekit
from stablekit.testing import CHECKS, Factory, check_plugin
from stablekit_updates import QKClip
from stablekit_updates.qk_clip import clip_factors, group_factors, scale_heads_
from tests.monitors.watched import Run, Transformer, hooks_in, words
from tests.updates.clipped import EXACT, KINDS, Plus, each_kind, logits_of, loud, maxima, still
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from collections.abc import Callable


def test_fused_weights_of_grouped_queries_are_those_of_megatron() -> None:
    inputs, expected = golden("qk_clip")
    weight = inputs["linear_qkv"].clone()
    seen = torch.tensor(expected["group_head_max"], dtype=torch.float64).flatten()
    factors = group_factors(clip_factors(seen, expected["tau"]), 2)
    torch.testing.assert_close(factors, torch.tensor(expected["eta"], dtype=torch.float64))
    groups = weight.view(2, 12, 5)
    for i in range(2):
        half = factors[i : i + 1] ** expected["alpha"]
        scale_heads_(groups[i], half, start=0, width=6)
        scale_heads_(groups[i], half, start=6, width=3)
    clipped = torch.tensor(expected["megatron_gqa_clipped"], dtype=torch.float64)
    torch.testing.assert_close(weight, clipped, rtol=1e-9, atol=1e-9)


class Biased(nn.Module):
    """Two heads of three, with biases, and nothing masked."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.wq, self.wk = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        for layer, side in ((self.wq, "q"), (self.wk, "k")):
            layer.weight.data, layer.bias.data = (
                inputs[f"w{side}"].clone(),
                inputs[f"b{side}"].clone(),
            )

    def forward(self, x: Tensor) -> Tensor:
        made = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.wq, self.wk))
        query, key = made
        return nn.functional.scaled_dot_product_attention(
            query, key, x[:, None].expand(-1, 2, -1, -1)
        )

    def maxima(self, x: Tensor) -> Tensor:
        made = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.wq, self.wk))
        query, key = made
        return maxima(query @ key.mT * 3**-0.5).detach()


def test_biases_are_scaled_so_that_the_maxima_are_the_golden_ones() -> None:
    inputs, outputs = golden("qk_clip")
    expected, model = outputs["bias_case"], nn.ModuleDict({"attn": Biased(inputs)})
    attention: Any = model["attn"]
    assert attention.maxima(inputs["x"]).numpy() == pytest.approx(expected["max_per_head"])
    names: dict[str, Any] = {"query": "attn.wq", "key": "attn.wk", "layers": "attn", "head_dim": 3}
    optimizer = still(model.parameters())
    session = stablekit.attach(optimizer, QKClip(expected["tau"], **names), model=model)
    attention(inputs["x"]).sum().backward()
    optimizer.step()
    after = attention.maxima(inputs["x"]).numpy()
    np.testing.assert_allclose(after, expected["max_after_with_bias"], rtol=1e-6)
    assert session.metrics()["qk-clip/clipped"] == 0.5


@given(st.integers(0, 10**6), st.floats(0.1, 5.0), st.floats(0, 1))
def test_the_new_maxima_are_the_threshold_and_alpha_does_not_matter(
    seed: int, threshold: float, alpha: float
) -> None:
    model, other = loud(), loud()
    batch = words(seed)
    before = maxima(logits_of(model, batch)[0])
    Run(QKClip(threshold, alpha=alpha, **EXACT), model=model, make=still).step(seed)
    Run(QKClip(threshold, **EXACT), model=other, make=still).step(seed)
    after = logits_of(model, batch)[0]
    expected = torch.where(before > threshold, torch.full_like(before, threshold), before)
    torch.testing.assert_close(maxima(after), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(after, logits_of(other, batch)[0], rtol=2e-5, atol=2e-6)


@each_kind
def test_nothing_changes_bitwise_where_nothing_is_above_the_threshold(kind: str) -> None:
    bare, clipped = Run(), Run(QKClip(1000.0, **KINDS[kind]))
    for _ in range(3):
        bare.step()
        assert clipped.step()["qk-clip/clipped"] == 0
    pairs = zip(bare.model.parameters(), clipped.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert clipped.events("clip") == []


@each_kind
@pytest.mark.parametrize("device_mode", [False, True])
def test_only_queries_and_keys_of_heads_above_the_threshold_change(
    kind: str, device_mode: bool
) -> None:
    model = loud()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Run(QKClip(1.0, **KINDS[kind]), model=model, make=still, device_mode=device_mode)
    with torch.no_grad():  # a head far below the threshold
        for name in ("wq", "wk"):
            getattr(model.blocks[0].attn, name).weight[:4] *= 1e-3
            getattr(model.blocks[0].attn, name).bias[:4] *= 1e-3
            before[f"blocks.0.attn.{name}.weight"][:4] *= 1e-3
            before[f"blocks.0.attn.{name}.bias"][:4] *= 1e-3
    run.step(3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{i}.attn.{layer}.{part}"
        for i in range(2)
        for layer in ("wq", "wk")
        for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        name = f"blocks.0.attn.wq.{part}"
        assert torch.equal(before[name][:4], after[name][:4])
        ratio = after[name][4:] / before[name][4:]
        assert ratio.max() - ratio.min() < 1e-6
        assert ratio.max() < 1


def test_optimizer_state_is_not_touched() -> None:
    def adam(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - as torch
        return torch.optim.AdamW(params, lr=0.0)

    bare, clipped = Run(model=loud(), make=adam), Run(QKClip(1.0, **EXACT), model=loud(), make=adam)
    bare.step()
    clipped.step()
    ours, theirs = (run.optimizer.state_dict()["state"] for run in (clipped, bare))
    for i, entries in theirs.items():
        for key, value in entries.items():
            assert torch.equal(ours[i][key], value)


def test_what_is_clipped_again_hardly_moves() -> None:
    run = Run(QKClip(1.0, **EXACT), model=loud(), make=still)
    run.step(3)
    run.step(3)  # the second block has seen another stream
    once = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.step(3)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("device_mode", [False, True])
def test_a_step_without_forward_pass_changes_nothing(device_mode: bool) -> None:
    run = Run(QKClip(1.0, **EXACT), model=loud(), make=still, device_mode=device_mode)
    run.step(3)
    once = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.optimizer.step()
    assert all(torch.equal(value, once[name]) for name, value in run.model.state_dict().items())
    assert math.isnan(run.metrics()["qk-clip/max_logit"])


def test_negative_and_non_finite_maxima_leave_a_head_alone() -> None:
    seen = torch.tensor([-3.0, 0.0, math.inf, -math.inf, math.nan, 4.0])
    assert clip_factors(seen, 2.0).tolist() == [1, 1, 1, 1, 1, 0.5]


def test_bf16_weights_stay_within_a_hundredth_of_the_threshold() -> None:
    model = loud().bfloat16()

    def grow(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - as torch
        return torch.optim.SGD(params, lr=0.0, weight_decay=0.0)

    run = Run(QKClip(2.0, **KINDS["bound"]), model=model, make=grow)
    seen = [run.step(3)["qk-clip/max_logit"] for _ in range(8)]
    assert seen[0] > 4.0
    assert max(seen[2:]) <= 2.0 * 1.02


def test_a_head_that_grows_is_held_at_the_threshold_in_bf16() -> None:
    run = Run(QKClip(2.0, **KINDS["bound"]), model=loud().bfloat16(), make=still)
    weights = [p for n, p in run.model.named_parameters() if "wq.weight" in n]
    seen = []
    for _ in range(60):
        seen.append(run.step(3)["qk-clip/max_logit"])
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1 + 2**-7)
    assert max(seen[5:]) <= 2.0 * 1.05


def test_detach_takes_every_hook_away() -> None:
    for options in KINDS.values():
        model = Transformer()
        run = Run(QKClip(**options), model=model)
        assert run.session is not None
        assert hooks_in(model) > 1
        run.session.detach()
        assert hooks_in(model) == 0


def test_only_restricts_it_to_some_layers() -> None:
    model = loud()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plugin = stablekit.only(QKClip(1.0, **EXACT), include="blocks.1.*")
    metrics = Run(plugin, model=model, make=still).step(3)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert {name.partition(".attn")[0] for name in changed} == {"blocks.1"}
    assert 0 < metrics["qk-clip/clipped"] <= 0.5


class Fused(nn.Module):
    """Queries, keys and values from one linear layer, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        made = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        query, key, value = made
        return nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("logits", ["exact", "bound"])
def test_a_fused_linear_layer_is_scaled_in_parts(logits: str) -> None:
    model = nn.ModuleDict({"attn": Fused()})
    fused: Any = model["attn"]
    before = fused.qkv.weight.detach().clone()
    names: dict[str, Any] = {"query": "attn.qkv", "key": "attn.qkv", "head_dim": 4, "fused": True}
    names |= {"layers": "attn"} if logits == "exact" else {}
    optimizer = still(model.parameters())
    stablekit.attach(optimizer, QKClip(0.01, logits=logits, **names), model=model)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))

    def seen() -> Tensor:
        query, key = (part.unflatten(-1, (2, 4)) for part in fused.qkv(x).chunk(3, -1)[:2])
        if logits == "bound":
            longest: list[Tensor] = [x.detach().norm(dim=-1).amax((0, 1)) for x in (query, key)]
            return longest[0] * longest[1] / 2
        products: Tensor = query.transpose(1, 2) @ key.transpose(1, 2).mT / 2
        return maxima(products).detach()

    assert bool((seen() > 0.02).all())
    fused(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(seen(), torch.full((2,), 0.01), rtol=1e-5, atol=0)
    assert torch.equal(fused.qkv.weight[16:], before[16:])


def test_one_layer_that_makes_queries_and_keys_takes_the_root() -> None:
    model = nn.ModuleDict({"both": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))})
    optimizer = still(model.parameters())
    clip = QKClip(0.01, alpha=0.9, logits="bound", query="both", key="both", scale=1.0)
    stablekit.attach(optimizer, clip, model=model)
    x = torch.ones(1, 2, 3)
    model["both"](x).sum().backward()
    optimizer.step()
    longest = model["both"](x).detach().norm(dim=-1).max()
    assert float(longest**2) == pytest.approx(0.01, rel=1e-5)


PlusNorm = type("PlusNorm", (Plus,), {})


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(4), lambda: nn.LayerNorm(4), PlusNorm])
def test_norms_of_queries_are_scaled_however_they_keep_their_gain(
    norm: Callable[[], nn.Module],
) -> None:
    def side() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), norm())

    model = nn.ModuleDict({"wq": side(), "wk": side()})
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))
    optimizer = still(model.parameters())
    clip = QKClip(0.01, logits="bound", query="wq", key="wk", scale=1.0)
    stablekit.attach(optimizer, clip, model=model)
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    before = (model["wq"](x) @ model["wk"](x).mT).detach()
    query, key = (model[name](x).detach().norm(dim=-1).max() for name in ("wq", "wk"))
    bound = float(query * key)
    (model["wq"](x).sum() + model["wk"](x).sum()).backward()
    optimizer.step()
    after = (model["wq"](x) @ model["wk"](x).mT).detach()
    torch.testing.assert_close(after, before * 0.01 / bound, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None]) -> None:
    check(QKClip.example)


def test_it_keeps_the_contract_where_it_clips_in_every_step() -> None:
    check_plugin(lambda: QKClip(1e-3, logits="bound", query="2", key="2", scale=1.0))
