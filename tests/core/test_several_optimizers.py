"""Optimizers that step together share one norm, one decision and one end of the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn, optim
from torch.amp import GradScaler

import stablekit
from stablekit.errors import AttachError, IncompleteRoundError, PluginError
from stablekit_clipping import AdaGC, ClipValue, GlobalNorm
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    Diary,
    backward,
    copies,
    difference,
    equal,
    gradients,
    picture,
    set_gradients,
    small_model,
)
from tests.core.test_broken_steps import Breaks, Fails


def _halves(model: nn.Module, make: type = optim.SGD) -> list[optim.Optimizer]:
    params = list(model.parameters())
    return [make(params[:2], lr=0.1), make(params[2:], lr=0.1)]


def _step(optimizers: list[optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def _step_scaled(optimizers: list[optim.AdamW], scaler: GradScaler) -> None:
    for optimizer in optimizers:
        scaler.step(optimizer)


def test_norm_is_of_the_union_and_hooks_fire_once() -> None:
    model, diary = small_model(), Diary()
    pair = _halves(model)
    session = stablekit.attach(pair, GlobalNorm(0.1), diary)
    backward(model)
    norm = torch.stack([grad.norm() for grad in gradients(model)]).norm()
    pair[0].step()
    assert "after_update" not in diary.pages
    pair[1].step()
    assert session.metrics()["grad_norm"] == pytest.approx(float(norm))
    assert diary.pages.count("observe_gradients") == diary.pages.count("after_update") == 1
    clipped = torch.stack([grad.norm() for grad in gradients(model)]).norm()
    assert float(clipped) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_pair_is_the_same_as_one_optimizer_of_all_parameters(fused: bool) -> None:
    model, twin = small_model(), small_model()
    params = list(model.parameters())
    pair = [optim.AdamW(params[:2], fused=fused), optim.AdamW(params[2:], fused=fused)]
    one = optim.AdamW(twin.parameters(), fused=fused)
    for optimizer in (pair, one):
        stablekit.attach(optimizer, NonFiniteGuard(), AdaGC(warmup_steps=2), ClipValue(0.1))
    for step in range(8):
        gain = math.nan if step == 3 else 1.0
        backward(model, step, gain=gain)
        for optimizer in pair:
            optimizer.step()
        backward(twin, step, gain=gain)
        one.step()
    torch.testing.assert_close(copies(params), copies(twin.parameters()))


def test_order_of_the_steps_does_not_matter() -> None:
    model = small_model()
    pair = _halves(model)
    session = stablekit.attach(pair, NonFiniteGuard())
    for order in ((0, 1), (1, 0), (0, 1)):
        backward(model)
        for i in order:
            pair[i].step()
    assert (session.number, session.updates) == (3, 3)


def test_skip_holds_for_all_of_them() -> None:
    model = small_model()
    pair = _halves(model, optim.AdamW)
    session = stablekit.attach(pair, NonFiniteGuard())
    set_gradients(model.parameters(), 1.0, 1.0, 1.0, math.nan)
    shown = [picture(optimizer) for optimizer in pair]
    for optimizer in pair:
        optimizer.step()
    assert [difference(s, picture(o)) for s, o in zip(shown, pair, strict=True)] == ["", ""]
    assert all(param.grad is not None for param in model.parameters())
    assert session.skipped == 1


def test_stepping_one_of_them_twice_is_an_error_that_names_the_other() -> None:
    model = small_model()
    first, second = (
        optim.SGD(list(model.parameters())[:2]),
        optim.AdamW(list(model.parameters())[2:]),
    )
    session = stablekit.attach([first, second], GlobalNorm())
    backward(model)
    first.step()
    backward(model)
    with pytest.raises(IncompleteRoundError, match=r"number 1 \(AdamW\)"):
        first.step()
    backward(model)
    first.step()
    second.step()
    assert session.updates == 1


def test_step_with_gradients_nobody_decided_about_is_an_error() -> None:
    model = small_model()
    pair = _halves(model)
    stablekit.attach(pair, NonFiniteGuard(), GlobalNorm(0.1))
    backward(model)
    pair[0].step()
    backward(model, gain=math.nan)
    before = copies(model.parameters())
    with pytest.raises(IncompleteRoundError, match=r"number 1 \(SGD\)"):
        pair[1].step()
    assert equal(before, copies(model.parameters()))


def test_after_one_of_them_raised_the_next_round_is_clean() -> None:
    for broken in (0, 1):
        model = small_model()
        pair = _halves(model, Breaks)
        session = stablekit.attach(pair, GlobalNorm(0.1))
        pair[broken].broken = True  # type: ignore[attr-defined]
        backward(model)
        with pytest.raises(RuntimeError, match="out of memory"):
            _step(pair)
        pair[broken].broken = False  # type: ignore[attr-defined]
        backward(model)
        for optimizer in pair:
            optimizer.step()
        assert (session.number, session.updates) == (2, 1)


def test_after_a_plugin_raised_the_next_round_is_clean() -> None:
    model = small_model()
    pair = _halves(model)
    session = stablekit.attach(pair, Fails("transform_gradients", 1))
    for step in range(2):
        backward(model)
        if step == 0:
            with pytest.raises(PluginError):
                pair[0].step()
            continue
        for optimizer in pair:
            optimizer.step()
    assert session.updates == 1


def test_two_sessions_of_a_gan_step_as_they_like() -> None:
    model = small_model()
    pair = _halves(model)
    sessions = [stablekit.attach(optimizer, GlobalNorm(0.1)) for optimizer in pair]
    for which in (0, 0, 0, 1):
        backward(model)
        pair[which].step()
    assert [session.updates for session in sessions] == [3, 1]


@pytest.mark.parametrize("fused", [(True, True), (False, False), (False, True)])
def test_scaled_gradients_of_several_optimizers_are_refused(fused: tuple[bool, bool]) -> None:
    model = small_model()
    params = list(model.parameters())
    pair = [optim.AdamW(params[:2], fused=fused[0]), optim.AdamW(params[2:], fused=fused[1])]
    stablekit.attach(pair, GlobalNorm(0.1))
    scaler = GradScaler("cpu", init_scale=1024.0)
    backward(model, gain=float(scaler.scale(torch.ones(()))))
    before = copies(params)
    with pytest.raises(AttachError, match=r"scaler.unscale_"):
        _step_scaled(pair, scaler)
    assert equal(before, copies(params))


@pytest.mark.parametrize("fused", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("culprit", [0, 2])
def test_overflow_in_one_of_them_leaves_the_next_round_clean(
    fused: tuple[bool, bool], culprit: int
) -> None:
    model = small_model()
    params = list(model.parameters())
    pair = [optim.AdamW(params[:2], fused=fused[0]), optim.AdamW(params[2:], fused=fused[1])]
    session = stablekit.attach(pair, NonFiniteGuard(max_consecutive=1), GlobalNorm(0.1))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        backward(model, step, gain=float(scaler.scale(torch.ones(()))))
        if step in (1, 2):
            grad = params[culprit].grad
            assert grad is not None
            grad.fill_(math.inf)
        before = copies(params)
        for optimizer in pair:
            scaler.unscale_(optimizer)
        for optimizer in pair:
            scaler.step(optimizer)
        scaler.update()
        assert equal(before, copies(params)) == (step in (1, 2))
    assert (session.updates, session.skipped) == (2, 2)
    assert [event.kind for event in session.events] == ["scaler-skip"] * 2
    assert scaler.get_scale() == 256.0
