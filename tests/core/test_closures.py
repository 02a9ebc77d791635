"""A step with a closure is one step, however often the optimizer evaluates the closure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim

import stablekit
from stablekit.errors import NonFiniteError
from stablekit_clipping import AdaGC, AutoClip, GlobalNorm, QuantileClip, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    Diary,
    X,
    Y,
    backward,
    copies,
    difference,
    equal,
    parameters_after,
    picture,
    set_gradients,
    small_model,
)

if TYPE_CHECKING:
    from stablekit import Plugin


@pytest.mark.parametrize("fused", [False, True])
def test_closure_of_one_evaluation_is_the_same_as_a_plain_step(fused: bool) -> None:
    model, twin = small_model(), small_model()
    with_closure = optim.AdamW(model.parameters(), fused=fused)
    plain = optim.AdamW(twin.parameters(), fused=fused)
    for optimizer in (with_closure, plain):
        stablekit.attach(optimizer, NonFiniteGuard(), ZClip(warmup_steps=3))
    set_gradients(model.parameters(), 1e9)  # stale: nothing of it may be clipped or learned from
    for step in range(6):
        with_closure.step(lambda step=step: backward(model, step))
    torch.testing.assert_close(copies(model.parameters()), parameters_after(6, plain, twin))
    mine, other = (stablekit.session(o).state_dict()["plugins"] for o in (with_closure, plain))
    assert mine["zclip"]["state"] == pytest.approx(other["zclip"]["state"], rel=1e-6)


def test_closure_may_be_given_by_keyword() -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, GlobalNorm(0.1))
    optimizer.step(closure=lambda: backward(model))
    assert session.metrics()["grad_norm_clipped"] == pytest.approx(0.1, rel=1e-4)


def test_skipped_closure_step_changes_no_bit_and_keeps_its_loss() -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters())
    session = stablekit.attach(optimizer, NonFiniteGuard(), ZClip())
    optimizer.step(lambda: backward(model))
    before = picture(optimizer)
    optimizer.step(lambda: backward(model, gain=math.inf))
    assert difference(before, picture(optimizer)) == ""
    assert all(p.grad is not None and not p.grad.isfinite().all() for p in model.parameters())
    assert session.skipped == 1


class CountsEverywhere(optim.SGD):
    """Counts its calls in every place where optimizers were seen to count."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.calls, self.box, self.tensor = 0, {"calls": [0]}, torch.zeros(1)
        self.extra: dict[Any, Any] = self.state

    def step(self, closure: Any = None) -> Any:
        self.extra["calls"] = self.extra.get("calls", 0) + 1
        loss = None if closure is None else closure()
        self.calls += 1
        self.box["calls"][0] += 1
        self.tensor += 1
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(param.grad, alpha=group["lr"])
        return loss


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("with_closure", [False, True])
def test_skipped_step_is_not_counted_anywhere(before: int, with_closure: bool) -> None:
    model = small_model()
    optimizer = CountsEverywhere(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, NonFiniteGuard())
    parameters_after(before, optimizer, model)
    shown = picture(optimizer)
    if with_closure:
        optimizer.step(lambda: backward(model, gain=math.nan))
    else:
        backward(model, gain=math.nan)
        optimizer.step()
    assert difference(shown, picture(optimizer)) == ""


@pytest.mark.parametrize(
    "plugin",
    [
        ZClip(warmup_steps=2, max_grad_norm=None),
        AdaGC(warmup_steps=2),
        AutoClip(),
        QuantileClip(history=3),
    ],
)
def test_statistics_take_in_the_first_evaluation_only(plugin: Plugin) -> None:
    model, twin = small_model(), small_model()
    attached = optim.LBFGS(model.parameters(), lr=0.05, max_iter=3)
    diary = Diary()
    session = stablekit.attach(attached, plugin, diary)
    by_first = optim.SGD(twin.parameters(), lr=0.0)
    observer = stablekit.attach(by_first, type(plugin)(**_settings(plugin)))
    for _ in range(4):
        twin.load_state_dict(model.state_dict())
        backward(twin)
        by_first.step()
        attached.step(lambda: backward(model))
    mine, other = (s.state_dict()["plugins"][plugin.name]["state"] for s in (session, observer))
    assert difference(mine, other) == ""
    assert max(diary.evaluations) >= 2
    assert (session.number, session.updates, len(diary.steps)) == (4, 4, 4)


def _settings(plugin: Plugin) -> dict[str, Any]:
    known = {"warmup_steps": 2} if isinstance(plugin, (ZClip, AdaGC)) else {}
    if isinstance(plugin, ZClip):
        return {**known, "max_grad_norm": None}
    return {"history": 3} if isinstance(plugin, QuantileClip) else known


def test_later_evaluations_use_the_threshold_of_the_first() -> None:
    model = nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    class Twice(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                closure()
                seen.append(float(model.weight.grad))  # type: ignore[arg-type]

    optimizer = Twice(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, AutoClip(50.0))
    sizes = iter([1.0, 100.0, 3.0, 100.0])

    def closure() -> None:
        set_gradients(model.parameters(), next(sizes))

    optimizer.step(closure)
    optimizer.step(closure)
    assert seen == pytest.approx([1.0, 1.0, 2.0, 2.0], rel=1e-5)  # medians of [1] and of [1, 3]


@pytest.mark.parametrize("device_mode", [False, True])
def test_later_evaluation_that_is_not_finite_is_a_clear_error(device_mode: bool) -> None:
    model = small_model()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    stablekit.attach(optimizer, NonFiniteGuard(), device_mode=device_mode)
    gains = iter([1.0, math.nan, 1.0, 1.0])
    with pytest.raises(NonFiniteError, match="evaluation 2 of the closure in step 1"):
        optimizer.step(lambda: backward(model, gain=next(gains)))


def test_evaluations_after_a_skipped_first_one_do_not_reach_the_optimizer() -> None:
    model = small_model()

    class Stubborn(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                closure()
                super().step()

    optimizer = Stubborn(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, NonFiniteGuard())
    before, gains = copies(model.parameters()), iter([math.nan, 1.0])
    optimizer.step(lambda: backward(model, gain=next(gains)))
    assert equal(before, copies(model.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (session.number, session.skipped) == (1, 1)


def test_value_of_the_closure_is_the_loss_of_the_step() -> None:
    model = small_model()
    optimizer, diary = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), Diary()
    stablekit.attach(optimizer, diary)
    losses = [float(optimizer.step(lambda: backward(model))) for _ in range(3)]
    assert diary.losses == pytest.approx(losses)


def test_observed_loss_comes_before_the_closures_and_does_not_leak_into_the_next_step() -> None:
    model = small_model()
    optimizer, diary = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), Diary()
    session = stablekit.attach(optimizer, diary)
    values = iter(range(1, 100))

    def closure() -> Tensor:
        session.observe(loss=float(next(values)))
        return backward(model)

    optimizer.step(closure)
    second = next(values) + 1
    optimizer.step(closure)
    assert diary.losses == [1.0, float(second)]


def test_loss_of_a_model_is_not_counted_twice_nor_from_later_evaluations() -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model()

        def forward(self, x: Tensor) -> Output:
            return Output(nn.functional.mse_loss(self.body(x), Y))

    model = WithLoss()
    optimizer, diary = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), Diary()
    stablekit.attach(optimizer, diary, model=model)

    def closure() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(X).loss
        loss.backward()
        return loss.detach() * 10

    losses = [float(optimizer.step(closure)) for _ in range(2)]
    assert diary.losses == pytest.approx(losses)
