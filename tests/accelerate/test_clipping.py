"""``accelerator.clip_grad_norm_`` of the loop: the norm at once, the clipping in the step."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import stablekit_accelerate
from tests.accelerate.loops import (
    NAN,
    Watch,
    adamw,
    loss_of,
    network,
    prepared,
    sgd,
    train,
    weights,
)


def clipped_by_hand(*gains: float, limit: float) -> tuple[list[float], torch.Tensor]:
    """Train as Accelerate alone would."""
    model = network()
    optimizer, norms = adamw(model), []
    for number, gain in enumerate(gains):
        torch.autograd.backward(loss_of(model, number, gain))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, weights(model)


def test_the_clipping_of_the_loop_is_done_and_plugins_see_what_backward_left() -> None:
    watch, gains = Watch(), (1.0, 5.0, 0.1, 20.0)
    kit = prepared(watch)
    norms = train(kit, *gains, limit=0.5)
    expected, reached = clipped_by_hand(*gains, limit=0.5)
    assert [float(norm) for norm in norms] == pytest.approx(expected, rel=1e-5)
    assert watch.norms == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights(kit.model), reached, rtol=1e-5, atol=1e-7)
    assert kit.session.latest.clipped_steps() == {"accelerate": sum(n > 0.5 for n in expected)}
    assert kit.session.metrics()["accelerate/threshold"] == 0.5


def test_the_clipping_of_the_loop_may_be_of_some_parameters_or_of_the_largest_element() -> None:
    kit, model = prepared(Watch(), make=sgd), network()
    optimizer = sgd(model)
    for gain in (3.0, 30.0):
        kit.accelerator.backward(loss_of(kit.model, 0, gain))
        torch.autograd.backward(loss_of(model, 0, gain))
        for layer, twin, kind in zip(kit.model, model, (2, None, math.inf), strict=True):  # type: ignore[call-overload]  # Sequential
            if kind is not None:
                got = kit.accelerator.clip_grad_norm_(layer.parameters(), 0.1, norm_type=kind)
                want = nn.utils.clip_grad_norm_(twin.parameters(), 0.1, norm_type=kind)
                assert float(got) == pytest.approx(float(want))
        kit.optimizer.step()
        kit.optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(kit.model), weights(model), rtol=1e-5, atol=1e-7)


def test_a_nan_is_blamed_on_its_tensor_although_the_loop_clips() -> None:
    kit = prepared("nonfinite-guard")
    kit.model[2].bias.register_hook(lambda grad: grad * NAN)  # type: ignore[index]  # Sequential
    train(kit, 1.0, limit=1.0)
    assert [event.tensors for event in kit.session.events] == [("2.bias",)] * 2


def test_the_loop_is_told_once_that_two_clip(caplog: pytest.LogCaptureFixture) -> None:
    kit = prepared("zclip")
    train(kit, 1.0, 1.0, limit=0.5)
    (said,) = [record.message for record in caplog.records]
    assert "clip_grad_norm_(max_norm=0.5) clips after zclip" in said


def test_the_call_only_measures_if_the_loop_is_not_to_clip() -> None:
    kit = prepared("global-norm:max_norm=2", loop_clips=False)
    (norm,) = train(kit, 1.0, limit=1e-3)
    assert kit.session.metrics()["grad_norm_clipped"] == pytest.approx(min(float(norm), 2.0))


def test_nothing_of_it_reads_the_device(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 3, device="meta")  # where every read raises
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    stablekit_accelerate.attach(accelerator, optimizer, "zclip", device_mode=True, log_every=0)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        accelerator.clip_grad_norm_(model.bias, 0.5)
        assert accelerator.clip_grad_norm_(model.parameters(), 0.5).is_meta
        optimizer.step()
    assert "clips after zclip" in caplog.text


def test_a_limit_is_for_one_step_only() -> None:
    kit = prepared(Watch())
    train(kit, 20.0, limit=0.5)
    train(kit, 20.0)
    assert kit.session.metrics()["grad_norm_clipped"] > 1


@pytest.mark.parametrize("how", ["dry run", "paused", "another optimizer", "one-norm"])
def test_where_a_step_cannot_clip_the_call_does_so_at_once(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    kit = prepared(watch, dry_run=how == "dry run")
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    kit.accelerator.backward(loss_of(kit.model, 0, 10.0))
    params = [*kit.model.parameters(), *([other] if how == "another optimizer" else [])]
    kind = 1 if how == "one-norm" else 2
    if how == "paused":
        with kit.session.paused():
            kit.accelerator.clip_grad_norm_(params, 0.25, norm_type=kind)
    else:
        kit.accelerator.clip_grad_norm_(params, 0.25, norm_type=kind)
    grads = [param.grad for param in params if param.grad is not None]
    assert nn.utils.get_total_norm(grads, kind) == pytest.approx(0.25, rel=1e-4)
    assert ("clips at once" in caplog.text) == (how in {"another optimizer", "one-norm"})
    kit.optimizer.step()
