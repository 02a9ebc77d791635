"""Learning rates are lowered while optimizers step, and nobody else ever sees it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import stablekit
from stablekit import hookimpl
from tests.core.oracles import X, Y, backward, copies, equal, small_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session, Step

HALF = 0.5

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda params, lr: optim.SGD(params, lr=lr, momentum=0.9),
    "adamw": lambda params, lr: optim.AdamW(params, lr=lr),
    "adamw fused": lambda params, lr: optim.AdamW(params, lr=lr, fused=True),
    "tensor lr": lambda params, lr: optim.AdamW(params, lr=torch.tensor(lr)),
    "tensor lr fused": lambda params, lr: optim.AdamW(params, lr=torch.tensor(lr), fused=True),
}


def rates(optimizer: optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def halved(session: Session) -> Session:
    session.scale_lr(HALF, by="test")
    return session


@pytest.mark.parametrize("device_mode", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_is_a_smaller_rate(name: str, device_mode: bool) -> None:
    model, twin = small_model(), small_model()
    ours, plain = (OPTIMIZERS[name](m.parameters(), lr) for m, lr in ((model, 0.02), (twin, 0.01)))
    session = stablekit.attach(ours, device_mode=device_mode)
    for step, factor in enumerate((1.0, HALF, HALF, 0.25)):
        session.scale_lr(factor, by="test")
        for group in plain.param_groups:
            rate = 0.02 * factor
            group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate
        backward(model, step)
        ours.step()
        backward(twin, step)
        plain.step()
        assert equal(copies(model.parameters()), copies(twin.parameters()))
        assert rates(ours) == pytest.approx([0.02])


def test_factors_of_plugins_multiply_and_are_told() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([param], lr=1.0)
    session = stablekit.attach(optimizer)
    session.scale_lr(0.5, by="one")
    session.scale_lr(0.25, by="other")
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == -0.125
    assert session.lr_factors == {"one": 0.5, "other": 0.25}
    session.scale_lr(1.0, by="other")
    optimizer.step()
    assert param.item() == -0.625


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_that_is_none_is_refused(value: float) -> None:
    session = stablekit.attach(optim.SGD([torch.zeros(1)]))
    with pytest.raises(ValueError, match="factor must be a finite number above 0"):
        session.scale_lr(value, by="test")
    assert session.lr_factors == {}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.8),
    ],
)
def test_schedulers_that_go_on_from_the_rate_never_see_the_factor(
    schedule: Any, tensor: bool
) -> None:
    seen = []
    for with_factor in (False, True):
        model = small_model()
        optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.1) if tensor else 0.1)
        scheduler = schedule(optimizer)
        session = stablekit.attach(optimizer)
        if with_factor:
            halved(session)
        row = []
        for step in range(6):
            backward(model, step)
            optimizer.step()
            scheduler.step()
            row.append(rates(optimizer)[0])
        seen.append(row)
    assert seen[0] == seen[1]


def test_each_of_several_optimizers_has_its_rate_back_after_its_own_step() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    pair = [optim.SGD([param], lr=1.0) for param in params]
    schedulers = [lr_scheduler.ExponentialLR(one, 0.5) for one in pair]
    halved(stablekit.attach(pair))
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(1)
        for one, scheduler in zip(pair, schedulers, strict=True):
            one.step()
            scheduler.step()
    assert [rates(one) for one in pair] == [[0.25], [0.25]]
    assert [param.item() for param in params] == [-0.75, -0.75]


def test_a_rate_that_groups_share_is_lowered_once() -> None:
    shared = torch.tensor(1.0)
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = optim.SGD([{"params": [param]} for param in params], lr=shared)
    halved(stablekit.attach(optimizer))
    for param in params:
        param.grad = torch.ones(1)
    optimizer.step()
    assert [param.item() for param in params] == [-0.5, -0.5]
    assert all(group["lr"] is shared for group in optimizer.param_groups)
    assert shared.item() == 1.0


class Breaking(optim.SGD):
    """Raises in the middle of a step when told to."""

    broken = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.broken:
            raise RuntimeError("no")
        super().step(closure)


def broken_off() -> tuple[Breaking, Session, nn.Parameter]:
    param = nn.Parameter(torch.zeros(1))
    optimizer = Breaking([param], lr=1.0)
    session = halved(stablekit.attach(optimizer))
    param.grad = torch.ones(1)
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    optimizer.broken = False
    return optimizer, session, param


def test_a_checkpoint_after_a_step_that_raised_holds_the_rate_itself() -> None:
    optimizer, _, _ = broken_off()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0
    assert rates(optimizer) == [1.0]


def test_a_step_that_raised_lowers_no_later_rate() -> None:
    optimizer, session, param = broken_off()
    optimizer.step()
    assert (param.item(), rates(optimizer)) == (-0.5, [1.0])
    optimizer, session, param = broken_off()
    with session.paused():
        optimizer.step()
    assert (param.item(), rates(optimizer)) == (-1.0, [1.0])
    optimizer, session, param = broken_off()
    session.detach()
    assert rates(optimizer) == [1.0]


def test_a_rate_set_after_a_step_that_raised_stays() -> None:
    for new in (0.3, torch.tensor(0.3)):
        optimizer, session, _ = broken_off()
        optimizer.param_groups[0]["lr"] = new
        session.detach()
        assert optimizer.param_groups[0]["lr"] is new


def test_a_rate_tensor_written_to_after_a_step_that_raised_keeps_what_was_written() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = Breaking([param], lr=torch.tensor(1.0))
    session = halved(stablekit.attach(optimizer))
    param.grad = torch.ones(1)
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.3)
    session.detach()
    assert rates(optimizer) == pytest.approx([0.3])


def test_paused_and_dry_steps_and_detached_optimizers_have_the_rate_itself() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([param], lr=1.0)
    session = halved(stablekit.attach(optimizer))
    param.grad = torch.ones(1)
    with session.paused():
        optimizer.step()
    session.detach()
    optimizer.step()
    halved(stablekit.attach(optimizer, dry_run=True))
    optimizer.step()
    assert param.item() == -3.0


def test_a_skipped_step_gives_the_rate_back_too() -> None:
    param = nn.Parameter(torch.zeros(1))
    for rate in (1.0, torch.tensor(1.0)):
        optimizer = optim.SGD([param], lr=rate)
        session = halved(stablekit.attach(optimizer, "nonfinite-guard"))
        param.grad = torch.tensor([math.nan])
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is rate
        session.detach()


def lbfgs(model: nn.Module, lr: float) -> optim.Optimizer:
    return optim.LBFGS(model.parameters(), lr=lr, max_iter=3, history_size=3)


@pytest.mark.parametrize(
    "make", [lbfgs, lambda m, lr: optim.SGD(m.parameters(), lr=lr, momentum=0.9)]
)
def test_optimizers_with_closures_step_at_the_lowered_rate(make: Any) -> None:
    model, twin = small_model(), small_model()
    ours, plain = make(model, 0.5), make(twin, 0.25)
    halved(stablekit.attach(ours))
    for step in range(3):
        for optimizer, trained in ((ours, model), (plain, twin)):

            def closure(
                step: int = step,
                optimizer: optim.Optimizer = optimizer,
                trained: nn.Module = trained,
            ) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(trained(X.roll(step, 0)), Y)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert rates(ours) == [0.5]
    assert equal(copies(model.parameters()), copies(twin.parameters()))


class Lender:
    """A plugin that changes rates for a step by itself, and looks at them."""

    name = "lender"

    def __init__(self) -> None:
        self.seen: list[float] = []

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        self.seen.append(float(step.lr))
        step.groups[0]["lr"] *= 0.1

    @hookimpl
    def after_update(self, step: Step) -> None:
        step.groups[0]["lr"] /= 0.1


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_see_the_rate_itself_and_may_change_it_for_a_step(with_closure: bool) -> None:
    param, lender = nn.Parameter(torch.zeros(1)), Lender()
    optimizer = optim.SGD([param], lr=1.0)
    halved(stablekit.attach(optimizer, lender))

    def closure() -> Tensor:
        param.grad = torch.ones(1)
        return torch.ones(())

    for _ in range(2):
        closure()
        optimizer.step(closure if with_closure else None)
    assert lender.seen == [1.0, 1.0]
    assert rates(optimizer) == [1.0]
    assert param.item() == pytest.approx(-0.1)


def test_groups_without_a_rate_are_passed_over() -> None:
    class Plain(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                param -= param.grad

    param = nn.Parameter(torch.zeros(1))
    optimizer = Plain([param])
    halved(stablekit.attach(optimizer))
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == -1.0
    assert "lr" not in optimizer.param_groups[0]
