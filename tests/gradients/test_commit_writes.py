"""Factors of all plugins are written together: once, or not at all."""

from __future__ import annotations

import pytest
import torch

import stablekit
from stablekit._commit import commit
from tests.gradients.books import NAMES, ledger_of, parameters, view_of, writes_of_commit

HELD = len(NAMES) - 2
"""All but the tensor without gradient and the one without elements (it has no address)."""


def test_nothing_pending_writes_nothing() -> None:
    assert writes_of_commit(ledger_of(parameters())) == 0


@pytest.mark.parametrize("units", [False, True])
def test_factors_that_are_all_one_write_nothing(units: bool) -> None:
    ledger = ledger_of(parameters(), units=units)
    view = view_of(ledger)
    view.scale_(torch.tensor(1.0))
    view.scale_(torch.ones(len(NAMES)))
    view.scale_units_([torch.ones_like(unit) for unit in view.unit_norms()])
    assert writes_of_commit(ledger) == 0


def test_a_chain_of_factors_writes_every_gradient_once() -> None:
    ledger = ledger_of(parameters())
    view = view_of(ledger)
    view.scale_(torch.tensor(0.5))
    view.scale_(torch.full((len(NAMES),), 0.9))
    view.scale_units_([torch.full_like(unit, 0.7) for unit in view.unit_norms()])
    view.scale_(torch.tensor(0.3))
    assert writes_of_commit(ledger) == HELD
    assert writes_of_commit(ledger) == 0


def test_only_tensors_with_a_factor_are_written() -> None:
    ledger = ledger_of(parameters())
    view_of(ledger, (0, 4)).scale_(torch.tensor(0.5))
    view_of(ledger, (1,)).scale_units_([torch.tensor([0.5])])
    assert writes_of_commit(ledger) == 2


def test_on_a_device_a_shared_factor_is_one_pass_without_a_look_at_its_value() -> None:
    ledger = ledger_of(parameters(), host=False)
    view_of(ledger).scale_(torch.tensor(1.0))
    assert writes_of_commit(ledger) == HELD


def test_a_bf16_gradient_is_rounded_once_for_unit_and_tensor_factors() -> None:
    params = parameters()[8:]
    grad = params[0].grad
    assert grad is not None
    before = grad.float()
    ledger = ledger_of(params)
    view = view_of(ledger)
    view.scale_units_([torch.full((4,), 0.3)])
    view.scale_(torch.tensor(0.7))
    commit(ledger)
    expected = (before * (torch.tensor(0.3) * torch.tensor(0.7))).bfloat16()
    assert torch.equal(grad, expected)


def test_agc_takes_parameters_of_every_kind() -> None:
    params = parameters()
    session = stablekit.attach(torch.optim.SGD(params[:5]), "agc")
    grads = [None if p.grad is None else p.grad.clone() for p in params[:5]]
    session.optimizers[0].step()
    factor = 0.01 * params[2].detach().abs().clamp(min=1e-3)
    scalar, before = params[2].grad, grads[2]
    assert scalar is not None
    assert before is not None
    assert scalar.abs().item() <= before.abs().item()
    assert scalar.abs().item() == pytest.approx(factor.item(), rel=1e-2)
