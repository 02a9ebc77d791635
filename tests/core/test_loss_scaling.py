"""Under a GradScaler plugins see true gradients, and the scaler finds what it left."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.amp import GradScaler

import stablekit
from stablekit import Step, hookimpl
from stablekit_clipping import AGC, AdaGC, ClipValue, GlobalNorm
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    BeforeUpdate,
    Diary,
    X,
    Y,
    copies,
    equal,
    gradients,
    set_gradients,
    small_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Plugin

SCALE = 1024.0
FUSED: dict[str, Any] = {
    "Adam": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01, fused=True),
    "SGD": partial(optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "Adagrad": partial(optim.Adagrad, lr=0.01, fused=True),
}
CASES: dict[str, Any] = {**FUSED, "AdamW-plain": partial(optim.AdamW, lr=0.01, fused=False)}


def _global_norm(grads: list[Tensor]) -> list[Tensor]:
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    return [grad * (0.5 / (norm + 1e-6)).clamp(max=1.0) for grad in grads]


def _values(grads: list[Tensor]) -> list[Tensor]:
    return [grad.clamp(-0.05, 0.05) for grad in grads]


def _each(grads: list[Tensor]) -> list[Tensor]:
    """Do what the second step of AdaGC(warmup_steps=0) does: clip at 1.04 times the first norm."""
    return [
        grad * (1.04 / (grad.norm() / _FIRST[i])).clamp(max=1.0) for i, grad in enumerate(grads)
    ]


_FIRST: list[Tensor] = []

CHAINS: dict[
    str, tuple[Callable[[], list[Plugin]], list[Callable[[list[Tensor]], list[Tensor]]]]
] = {
    "nothing clips": (lambda: [GlobalNorm(1e6)], []),
    "one factor": (lambda: [GlobalNorm(0.5)], [_global_norm]),
    "an edit": (lambda: [ClipValue(0.05)], [_values]),
    "a factor after an edit": (lambda: [ClipValue(0.05), GlobalNorm(0.5)], [_values, _global_norm]),
    "an edit after a factor": (lambda: [GlobalNorm(0.5), ClipValue(0.05)], [_global_norm, _values]),
}


def _backward(model: nn.Module, step: int, scaler: GradScaler | None) -> None:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(X.roll(step, 0)), Y) * (1 + step)
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device_mode", [False, True])
def test_clipping_equals_unscale_and_clip_by_hand(
    name: str, chain: str, explicit: bool, device_mode: bool
) -> None:
    model, twin = small_model(), small_model()
    mine, plain = CASES[name](model.parameters()), CASES[name](twin.parameters())
    plugins, by_hand = CHAINS[chain][0](), CHAINS[chain][1]
    session = stablekit.attach(mine, NonFiniteGuard(), *plugins, device_mode=device_mode)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    for step in range(6):
        _backward(model, step, scaler)
        if explicit:
            scaler.unscale_(mine)
        scaler.step(mine)
        scaler.update()
        assert not hasattr(mine, "grad_scale")
        assert not hasattr(mine, "found_inf")
        _backward(twin, step, None)
        raw = gradients(twin)
        seen = raw
        for clip in by_hand:
            seen = clip(seen)
        for param, grad in zip(twin.parameters(), seen, strict=True):
            param.grad = grad
        plain.step()
        norm = torch.stack([grad.norm() for grad in raw]).norm()
        assert session.metrics()["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(gradients(model), seen, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))
    assert scaler.get_scale() == SCALE * 4
    assert session.skipped == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [lambda: AGC(0.01), lambda: AdaGC(1.04, warmup_steps=1)])
def test_factors_per_tensor_and_unit_are_those_of_true_gradients(
    make: Callable[[], Plugin], fused: bool
) -> None:
    model, twin = small_model(), small_model()
    mine = optim.SGD(model.parameters(), lr=0.1, fused=fused)
    plain = optim.SGD(twin.parameters(), lr=0.1, fused=fused)
    for optimizer in (mine, plain):
        stablekit.attach(optimizer, make(), GlobalNorm(0.5))
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(5):
        _backward(model, step, scaler)
        scaler.step(mine)
        scaler.update()
        _backward(twin, step, None)
        plain.step()
        torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))


@pytest.mark.parametrize("name", FUSED)
def test_before_update_sees_true_gradients(name: str) -> None:
    model, seen = small_model(), BeforeUpdate()
    optimizer = FUSED[name](model.parameters())
    stablekit.attach(optimizer, GlobalNorm(0.5), seen)
    scaler = GradScaler("cpu", init_scale=SCALE)
    _backward(model, 0, scaler)
    scaler.step(optimizer)
    twin = small_model()
    _backward(twin, 0, None)
    torch.testing.assert_close(seen.seen[0], _global_norm(gradients(twin)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device_mode", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_overflow_is_the_scalers_own_business(name: str, explicit: bool, device_mode: bool) -> None:
    model, twin, diary = small_model(), small_model(), Diary()
    mine, plain = CASES[name](model.parameters()), CASES[name](twin.parameters())
    guard = NonFiniteGuard(max_consecutive=1)
    session = stablekit.attach(mine, guard, GlobalNorm(1e6), diary, device_mode=device_mode)
    scalers = GradScaler("cpu", init_scale=SCALE), GradScaler("cpu", init_scale=SCALE)
    for step in range(5):
        for optimizer, net, scaler in zip((mine, plain), (model, twin), scalers, strict=True):
            _backward(net, step, scaler)
            if step in (1, 2, 3):
                next(net.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))
    assert [scaler.get_scale() for scaler in scalers] == [SCALE / 8] * 2
    assert guard.state_dict() == {"in_a_row": 0, "total": 0}
    is_fused = name in FUSED
    assert [event.kind for event in session.events] == ["scaler-skip"] * (3 if is_fused else 0)
    assert (session.number, session.updates) == ((5, 2) if is_fused else (2, 2))
    assert diary.pages.count("on_skip") == (3 if is_fused else 0)


def test_skip_by_a_plugin_under_a_scaler_leaves_scaled_gradients_and_the_scale() -> None:
    class SkipSecond:
        name = "skip-second"

        @hookimpl
        def observe_gradients(self, step: Step) -> None:
            step.skip("it is the second", when=step.number == 2)

    for device_mode in (False, True):
        model = small_model()
        optimizer = optim.AdamW(model.parameters(), fused=True)
        stablekit.attach(optimizer, SkipSecond(), GlobalNorm(0.5), device_mode=device_mode)
        scaler = GradScaler("cpu", init_scale=SCALE)
        for step in range(3):
            _backward(model, step, scaler)
            before, raw = copies(model.parameters()), gradients(model)
            scaler.step(optimizer)
            scaler.update()
            assert equal(before, copies(model.parameters())) == (step == 1)
            assert equal(raw, gradients(model)) == (step == 1)
        assert scaler.get_scale() == SCALE


def test_attributes_set_by_the_caller_are_put_back_as_they_were() -> None:
    model = small_model()
    optimizer: Any = optim.AdamW(model.parameters(), fused=True)
    scale, found = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.grad_scale, optimizer.found_inf = scale, found
    stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(0.5), device_mode=True)
    for _ in range(2):
        set_gradients(model.parameters(), 2.0)
        optimizer.step()
        assert optimizer.grad_scale is scale
        assert optimizer.found_inf is found


def test_global_factor_rides_on_the_scale_without_a_pass_over_the_gradients() -> None:
    versions: list[int] = []

    class SeesAttributes(optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            versions.extend(grad._version for grad in grads)
            return super().step(closure)

    model = small_model()
    optimizer = SeesAttributes(model.parameters(), fused=True)
    session = stablekit.attach(optimizer, GlobalNorm(0.01))
    _backward(model, 0, None)
    before = [p.grad._version for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert versions == before
    assert session.metrics()["grad_norm_clipped"] == pytest.approx(0.01, rel=1e-4)
