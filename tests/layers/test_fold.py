"""Folding leaves a plain model that computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

from stablekit.errors import AttachError
from stablekit_layers import (
    HybridNorm,
    NormFormer,
    PeriNorm,
    ScaledWeightStandardization,
    apply,
    check,
    fold,
)
from tests.layers.models import FAMILIES, llama, logits, shake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

every_family = pytest.mark.parametrize("family", FAMILIES)


def head_gains(placement: str = "paper") -> NormFormer:
    return NormFormer(attention_norm=False, ffn_norm=False, placement=placement)


def hooks_of(model: nn.Module) -> int:
    modules: list[Any] = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def is_plain(model: Any, plain: Any, folder: Path) -> None:  # noqa: ANN401 - models of transformers
    """Check that nothing is left of a surgery, in memory and in what is saved."""
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert hooks_of(model) == hooks_of(plain)
    assert model.config.to_dict() == plain.config.to_dict()
    check(model)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))


@every_family
def test_standardised_weights_fold_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = apply(FAMILIES[family](), ScaledWeightStandardization(activation="silu"))
    shake(model)
    before = logits(model)
    assert fold(model) is model
    assert torch.equal(logits(model), before)
    is_plain(model, FAMILIES[family](), tmp_path)


@every_family
@pytest.mark.parametrize("placement", ["paper", "fairseq"])
def test_gains_of_heads_fold_up_to_rounding(family: str, placement: str, tmp_path: Path) -> None:
    given = {} if family == "gpt2" else {"attention_bias": True}
    plain = FAMILIES[family](**given)
    model = apply(FAMILIES[family](**given), head_gains(placement)).double()
    shake(model)
    before = logits(model)
    assert (before - logits(plain.double())).abs().max() > 1e-3
    fold(model)
    assert torch.allclose(logits(model), before, rtol=1e-13, atol=1e-13)
    is_plain(model, plain, tmp_path)


@every_family
@pytest.mark.parametrize("placement", ["paper", "fairseq"])
def test_gains_that_are_powers_of_two_fold_bit_for_bit(family: str, placement: str) -> None:
    model = apply(FAMILIES[family](), head_gains(placement))
    gains = [m.head_norm.weight for m in model.modules() if hasattr(m, "head_norm")]
    for gain in gains:
        gain.data = torch.tensor([0.5, 2.0, -4.0, 1.0])
    before = logits(model)
    assert torch.equal(logits(fold(model)), before)


def test_rows_of_conv1d_and_columns_of_linear_layers_are_scaled() -> None:
    expected = torch.tensor([2.0] * 8 + [1.0] * 24)
    for family, name, dim in (("llama", "o_proj.weight", 1), ("gpt2", "attn.c_proj.weight", 0)):
        plain, model = FAMILIES[family](), apply(FAMILIES[family](), head_gains())
        for module in model.modules():
            if hasattr(module, "head_norm"):
                module.head_norm.weight.data[0] = 2.0
        fold(model)
        pairs = zip(model.state_dict().items(), plain.state_dict().values(), strict=True)
        for (key, ours), theirs in pairs:
            factors: Tensor = torch.ones(1)
            if key.endswith(name):
                factors = expected[None, :] if dim == 1 else expected[:, None]
            assert torch.equal(ours, theirs * factors), key


@every_family
@pytest.mark.parametrize("turned", [False, True])
def test_both_fold_together_in_whichever_order_they_were_made(family: str, turned: bool) -> None:
    surgeries = [head_gains(), ScaledWeightStandardization()]
    model = apply(FAMILIES[family](), *(reversed(surgeries) if turned else surgeries)).double()
    shake(model)
    before = logits(model)
    fold(model)
    assert torch.allclose(logits(model), before, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(FAMILIES[family]().state_dict())


def test_one_of_two_can_be_folded_by_name() -> None:
    model = apply(llama(), NormFormer(), ScaledWeightStandardization())
    shake(model)
    before = logits(model)
    fold(model, "scaled-ws")
    assert torch.equal(logits(model), before)
    assert [one["name"] for one in model.config.stablekit_surgery] == ["normformer"]
    check(model)


def test_folded_weights_are_the_parameters_that_were_trained() -> None:
    model = apply(llama(), ScaledWeightStandardization())
    layer: Any = model.model.layers[0].mlp.up_proj
    original = layer.parametrizations.weight.original
    fold(model)
    assert layer.weight is original
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        (NormFormer(), "normformer cannot be folded: no weight computes its attention_norm"),
        (
            NormFormer(attention_norm=False, ffn_norm=False, residual_scale=True),
            "computes its residual_scale",
        ),
        (HybridNorm(), "hybridnorm cannot be folded"),
        (PeriNorm(), "peri-ln cannot be folded"),
    ],
)
def test_what_cannot_fold_is_refused_by_name_and_nothing_changes(
    surgery: Any,  # noqa: ANN401
    words: str,
) -> None:
    model = apply(llama(), ScaledWeightStandardization(), surgery)
    names, before = list(model.state_dict()), logits(model)
    with pytest.raises(AttachError, match=words):
        fold(model)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)


def test_weights_that_are_computed_take_no_gains() -> None:
    model = apply(llama(), head_gains(), ScaledWeightStandardization())
    with pytest.raises(AttachError, match="computed from another one"):
        fold(model, "normformer")
    assert parametrize.is_parametrized(model.model.layers[0].self_attn.o_proj)


def test_names_that_are_not_on_the_model_are_refused() -> None:
    model = apply(llama(), ScaledWeightStandardization())
    with pytest.raises(AttachError, match="qk-norm is not on this model; surgeries found: scaled"):
        fold(model, "qk-norm")


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_model_is_refused_and_goes_on_as_it_was() -> None:
    model = apply(nn.Sequential(nn.Linear(4, 4)), ScaledWeightStandardization())
    expected = model(torch.ones(2, 4)).detach()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(AttachError, match="sharded"):
        fold(model)
    assert torch.allclose(model(torch.ones(2, 4)), expected)


def test_model_without_surgeries_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    assert torch.equal(fold(model).weight, before)
