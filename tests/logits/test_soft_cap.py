"""Soft-capping: its numbers, and that a model stays capped wherever it computes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import stablekit
from stablekit.errors import AttachError
from stablekit.testing import check_plugin
from stablekit_logits import SoftCap, SoftCapping, ZLoss, soft_cap, z_loss
from tests.logits.goldens import far, golden
from tests.logits.models import Speaker, words

INPUTS, OUTPUTS, TOLERANCE = golden("zloss_softcap")
LOGITS, TARGETS = INPUTS["logits"], INPUTS["targets"]


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_the_numbers_of_gemma(cap: float) -> None:
    expected = OUTPUTS[f"softcap{cap}"]
    logits = LOGITS.clone().requires_grad_()
    capped = soft_cap(logits, cap)
    loss = cross_entropy(capped, TARGETS)
    loss.backward()
    assert logits.grad is not None
    assert far(capped[0].detach(), expected["capped_row0"]) < TOLERANCE
    assert far(loss.detach(), expected["ce"]) < TOLERANCE
    assert far(logits.grad[0], expected["grad_row0"]) < TOLERANCE


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(0.1, 100))
def test_the_cap_holds_and_order_is_kept(values: list[float], cap: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    capped = soft_cap(logits, cap)
    assert (capped.abs() <= cap).all()
    assert (capped[logits.argsort()].diff() >= 0).all()


@given(st.floats(-0.05, 0.05), st.floats(1, 100))
def test_small_logits_lose_their_cube_over_three_caps_squared(share: float, cap: float) -> None:
    value = torch.tensor(share * cap, dtype=torch.float64)
    expected = value - value**3 / (3 * cap**2)
    assert float((soft_cap(value, cap) - expected).abs()) <= abs(share) ** 5 * cap


@given(st.integers(2, 50), st.floats(0.5, 8))
def test_cross_entropy_does_not_go_below_the_floor_of_the_cap(classes: int, cap: float) -> None:
    logits = torch.full((1, classes), -1e4, dtype=torch.float64)
    logits[0, 0] = 1e4
    found = cross_entropy(soft_cap(logits, cap), torch.tensor([0]))
    assert float(found) == pytest.approx(math.log(1 + (classes - 1) * math.exp(-2 * cap)))


def test_bfloat16_is_computed_in_float32_and_stays_bfloat16() -> None:
    logits = torch.linspace(-60, 60, 241).to(torch.bfloat16)
    found = soft_cap(logits, 30.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, soft_cap(logits.double(), 30.0).to(torch.bfloat16))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, "30"])
def test_a_bad_cap_is_refused(cap: Any) -> None:  # noqa: ANN401 - any value
    for make in (SoftCap, SoftCapping):
        with pytest.raises((TypeError, ValueError), match="cap"):
            make(cap)


@pytest.mark.parametrize("on", [None, "head"])
def test_the_model_is_capped_in_training_evaluation_and_without_gradients(on: str | None) -> None:
    model, ids = Speaker(), words()
    expected = soft_cap(model(ids), 2.0)
    session = stablekit.attach(rate(model), SoftCap(2.0, on=on), model=model)
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.eval()(ids), expected)
    with torch.no_grad():
        assert torch.equal(model(ids), expected)
    with session.paused():
        assert torch.equal(model.train()(ids), expected)
    session.detach()
    assert not torch.equal(model(ids), expected)


def test_copies_stay_capped_and_are_not_watched() -> None:
    model, ids = Speaker(), words()
    session = stablekit.attach(rate(model), SoftCap(2.0), ZLoss(0.1), model=model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    session.detach()
    capped = soft_cap(model(ids), 2.0)
    for one in copies:
        assert torch.equal(one(ids), capped)
        plain = Speaker().loss_function(capped, ids)
        assert torch.equal(one(ids, ids), plain)


def test_a_dry_run_caps_nothing_and_records() -> None:
    model, ids = Speaker(), words()
    plain = model(ids, ids)
    optimizer = rate(model)
    session = stablekit.attach(optimizer, SoftCap(2.0), model=model, dry_run=True)
    found = model(ids, ids)
    found.backward()
    optimizer.step()
    assert torch.equal(found, plain)
    assert torch.equal(model.eval()(ids, ids), Speaker.forward(model, ids, ids))
    assert session.metrics()["soft-cap/saturated"] > 0


def test_the_share_of_saturated_logits_is_recorded() -> None:
    model, ids = Speaker(), words()
    expected = float((model(ids).abs() > 2.0).float().mean())
    optimizer = rate(model)
    session = stablekit.attach(optimizer, SoftCap(2.0), model=model)
    model(ids, ids).backward()
    optimizer.step()
    assert 0 < expected < 1
    assert session.metrics()["soft-cap/saturated"] == pytest.approx(expected)


@pytest.mark.parametrize("first", ["z-loss", "soft-cap"])
def test_a_z_loss_sees_the_capped_logits_whatever_the_order(first: str) -> None:
    model, ids = Speaker(), words()
    capped = soft_cap(model(ids), 2.0)
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model.loss_function(capped, ids) + 0.1 * z_loss(capped, targets)
    plugins = [ZLoss(0.1), SoftCap(2.0)] if first == "z-loss" else [SoftCap(2.0), ZLoss(0.1)]
    with stablekit.attach(rate(model), *plugins, model=model):
        torch.testing.assert_close(model(ids, ids), expected)


def test_of_two_on_one_module_the_first_listed_acts_first() -> None:
    model, ids = Speaker(), words()
    expected = soft_cap(soft_cap(model(ids), 5.0), 2.0)
    plugins = [SoftCap(5.0), SoftCap(2.0, name="again")]
    with stablekit.attach(rate(model), *plugins, model=model):
        assert torch.equal(model(ids), expected)


def test_a_model_without_output_embedding_is_told_to_name_a_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttachError, match="on="):
        stablekit.attach(rate(model), SoftCap(), model=model)
    with pytest.raises(AttachError, match="matches no module"):
        stablekit.attach(rate(model), SoftCap(on="head"), model=model)


def test_the_contract_is_kept() -> None:
    check_plugin(lambda: SoftCap(1.0, on=""))
