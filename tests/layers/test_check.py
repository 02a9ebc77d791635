"""``check`` refuses what would not train, or would be lost; a session warns of the first."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import stablekit
from stablekit.errors import NoEffectWarning, StateError
from stablekit_layers import NormFormer, QKNorm, ScaledWeightStandardization, apply, check, fold
from tests.layers.models import llama, logits, tokens, with_adapters

# What PEFT itself warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:  # noqa: ANN401 - of transformers
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_adapters_that_would_be_added_after_the_norm_are_refused() -> None:
    check(with_adapters(apply(llama(), QKNorm()), "v_proj"))
    with_adapters(apply(model := llama(), QKNorm()), "q_proj")
    with pytest.raises(StateError, match=r"q_proj\.base_layer after the norm or gain"):
        check(model)


def test_adapters_whose_merging_would_be_lost_are_refused() -> None:
    model = with_adapters(apply(llama(), ScaledWeightStandardization()), "q_proj")
    with pytest.raises(StateError, match=r"q_proj\.base_layer is computed by a surgery.*fold"):
        check(model)
    adapted = logits(model)
    assert not torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-3)


def test_adapters_on_a_folded_model_are_merged_as_they_were() -> None:
    model = with_adapters(fold(apply(llama(), ScaledWeightStandardization())), "q_proj")
    check(model)
    adapted = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-5)


def test_layers_that_standardisation_left_out_may_have_adapters() -> None:
    surgery = ScaledWeightStandardization(exclude="model.layers.*.self_attn.q_proj")
    check(with_adapters(apply(llama(), surgery), "q_proj"))


@pytest.mark.parametrize("surgery", [QKNorm(), NormFormer(), ScaledWeightStandardization()])
def test_an_optimizer_that_is_older_than_the_surgery_is_refused(surgery: Any) -> None:  # noqa: ANN401
    model = llama()
    older = adam(model)
    apply(model, surgery)
    with pytest.raises(StateError, match=r"no optimizer holds .*_norm\S* and \d+ more of the \d+"):
        check(model, older)
    check(model, adam(model))
    check(torch.compile(model, backend="eager"), adam(model))  # type: ignore[arg-type]
    added = [p for p in model.parameters() if id(p) not in held(older)]
    check(model, older, torch.optim.SGD(added))
    twin = copy.deepcopy(model)
    with pytest.raises(StateError, match="no optimizer holds"):
        check(twin, older, adam(model))


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def test_a_session_warns_of_an_optimizer_that_is_older_than_the_surgery() -> None:
    model = llama()
    optimizer = adam(model)
    apply(model, QKNorm())
    with pytest.warns(
        NoEffectWarning, match=r"q_norm\.weight and 3 more .* will not train"
    ) as told:
        stablekit.attach(optimizer, "zclip", model=model)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_a_session_that_is_older_than_the_surgery_warns_at_the_first_step() -> None:
    model = llama()
    optimizer = adam(model)
    stablekit.attach(optimizer, "zclip", model=model)
    apply(model, QKNorm())
    with pytest.warns(NoEffectWarning, match="4 more|3 more .* will not train") as told:
        step(model, optimizer)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_a_session_inside_a_wrapper_warns_too() -> None:
    inner = llama()
    optimizer = adam(inner)
    apply(inner, NormFormer())
    with pytest.warns(NoEffectWarning, match=r"0\.model\.layers\.0.* will not train"):
        stablekit.attach(optimizer, "zclip", model=nn.Sequential(inner))


def test_a_session_does_not_warn_where_leaving_parameters_out_may_be_meant() -> None:
    model = apply(llama(), QKNorm())
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim != 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stablekit.attach(adam(copy.deepcopy(model)), "zclip")
        stablekit.attach(torch.optim.SGD(model.lm_head.parameters()), "zclip", model=model)
        stablekit.attach(torch.optim.SGD(matrices), "zclip", model=model)
        stablekit.attach([torch.optim.SGD(matrices), torch.optim.SGD(others)], model=model)
        plain = llama()
        stablekit.attach(torch.optim.SGD(list(plain.parameters())[:-1]), "zclip", model=plain)


def test_frozen_gains_need_no_optimizer() -> None:
    model = llama()
    optimizer = adam(model)
    apply(model, QKNorm())
    for layer in model.model.layers:
        layer.self_attn.q_norm.requires_grad_(False)
        layer.self_attn.k_norm.requires_grad_(False)
    check(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stablekit.attach(optimizer, "zclip", model=model)
