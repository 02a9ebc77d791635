"""Steps that did not update: the accelerator and its schedulers know of each."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.accelerate.loops import NAN, Prepared, Watch, adamw, loss_of, prepared, train, weights

GUARD = "nonfinite-guard"


def scheduled(kit: Prepared) -> Any:  # noqa: ANN401 - Accelerate has no types
    inner = kit.optimizer.optimizer
    return kit.accelerator.prepare(torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5))


def with_scaler(scale: float = 1024.0) -> Any:  # noqa: ANN401 - an Accelerator
    """Return an accelerator in float16 with a GradScaler, which it makes on no CPU by itself."""
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def step(kit: Prepared, gain: float, *, limit: float | None = None) -> bool:
    """Step once and return whether the accelerator says that it was skipped."""
    train(kit, gain, limit=limit)
    return bool(kit.accelerator.optimizer_step_was_skipped)


@pytest.mark.parametrize("device_mode", [False, True])
@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_a_step_that_a_plugin_skips_is_known_to_the_accelerator(
    first: str, device_mode: bool
) -> None:
    kit = prepared(GUARD, first=first, device_mode=device_mode)
    assert [step(kit, gain) for gain in (1.0, NAN, NAN, 1.0)] == [False, True, True, False]


def test_a_prepared_scheduler_waits_for_a_skipped_step() -> None:
    kit = prepared(GUARD)
    scheduler = scheduled(kit)
    rates = []
    for gain in (1.0, NAN, 1.0):
        train(kit, gain, scheduler=scheduler)
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.025, 0.025, 0.0125]


def test_a_scheduler_goes_on_if_skips_are_not_reported() -> None:
    kit = prepared(GUARD, report_skips=False)
    scheduler = scheduled(kit)
    train(kit, NAN, scheduler=scheduler)
    assert scheduler.get_last_lr() == [0.025]
    assert not kit.accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device_mode", [False, True])
def test_an_overflow_is_known_to_the_accelerator_whatever_the_optimizer(
    fused: bool, limit: float | None, device_mode: bool
) -> None:
    # Of a fused optimizer Accelerate alone says that it was not skipped (accelerate#4242).
    make = functools.partial(adamw, fused=fused)
    kit = prepared(Watch(), accelerator=with_scaler(), make=make, device_mode=device_mode)
    before = weights(kit.model)
    assert step(kit, float("inf"), limit=limit)
    assert torch.equal(weights(kit.model), before)
    assert not step(kit, 1.0, limit=limit)
    assert not torch.equal(weights(kit.model), before)
    assert kit.accelerator.scaler.get_scale() == 512.0
    kinds = [event.kind for event in kit.session.events]
    assert ("scaler-skip" in kinds) == fused  # another is not even called
    assert kit.session.skipped == fused


@pytest.mark.parametrize("fused", [False, True])
def test_norms_and_limits_are_of_gradients_without_the_loss_scale(fused: bool) -> None:
    make = functools.partial(adamw, fused=fused)
    plain, scaled = Watch(), Watch()
    twin = prepared(plain, make=make)
    expected = train(twin, 5.0, 5.0, limit=0.5)
    kit = prepared(scaled, accelerator=with_scaler(), make=make)
    norms = train(kit, 5.0, 5.0, limit=0.5)
    near = 2e-3  # float16 has eleven bits
    torch.testing.assert_close(norms, expected, rtol=near, atol=0)
    assert scaled.norms == pytest.approx(plain.norms, rel=near)
    assert scaled.losses == pytest.approx(plain.losses, rel=near)
    torch.testing.assert_close(weights(kit.model), weights(twin.model), rtol=near, atol=near)


def test_a_flag_does_not_outlive_the_step_it_is_about() -> None:
    kit = prepared(GUARD)
    assert step(kit, NAN)
    with kit.session.paused():
        assert not step(kit, 1.0)


def test_a_dry_run_skips_nothing_and_says_so() -> None:
    kit = prepared(GUARD, dry_run=True)
    kit.accelerator.backward(loss_of(kit.model, 0, NAN))
    kit.optimizer.step()
    assert kit.session.skipped == 1
    assert not kit.accelerator.optimizer_step_was_skipped
