"""Parameters come, go, freeze and are swapped; their gradients may be missing or of any dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn, optim

import stablekit
from stablekit import Step, hookimpl
from stablekit_clipping import AdaGC, ClipValue, GlobalNorm, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    BeforeUpdate,
    Diary,
    backward,
    copies,
    difference,
    equal,
    picture,
    set_gradients,
    small_model,
)


def test_group_added_after_attach_is_clipped_and_named() -> None:
    model, late = small_model(), nn.Linear(4, 4)
    optimizer = optim.SGD([{"params": list(model.parameters())}], lr=0.1)
    session = stablekit.attach(optimizer, NonFiniteGuard(), AdaGC(warmup_steps=1), GlobalNorm(0.1))
    backward(model)
    optimizer.step()
    optimizer.add_param_group({"params": list(late.parameters())})
    set_gradients([*model.parameters(), *late.parameters()], 1.0)
    optimizer.step()
    squares = [p.grad.square().sum() for p in late.parameters() if p.grad is not None]
    total = [p.grad.square().sum() for p in model.parameters() if p.grad is not None] + squares
    assert float(sum(total)) ** 0.5 == pytest.approx(0.1, rel=1e-4)
    assert late.bias.grad is not None
    late.bias.grad.fill_(math.nan)
    optimizer.step()
    assert session.events[-1].tensors == ("group1.1(4)",)


def test_names_come_from_the_model() -> None:
    model = nn.Sequential(small_model())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, NonFiniteGuard(), model=model)
    set_gradients(model.parameters(), 1.0, math.inf, 1.0)
    optimizer.step()
    assert session.events[-1].tensors == ("0.0.bias",)


def test_missing_gradients_count_as_zero_and_stay_missing() -> None:
    model = small_model()
    optimizer, seen = optim.SGD(model.parameters(), lr=0.1), list[Tensor]()

    class Looks:
        name = "looks"

        @hookimpl
        def observe_gradients(self, step: Step) -> None:
            seen.extend([step.gradients.present, step.gradients.norms(), step.gradients.norm()])

    stablekit.attach(optimizer, Looks(), GlobalNorm(0.1), ClipValue(0.05))
    params = list(model.parameters())
    before = copies(params)
    params[0].grad = torch.full_like(params[0], 3.0)
    optimizer.step()
    assert seen[0].tolist() == [True, False, False, False]
    assert seen[1][1:].tolist() == [0.0, 0.0, 0.0]
    assert seen[2] == seen[1][0] == pytest.approx(3.0 * 128**0.5)
    assert [param.grad is None for param in params] == [False, True, True, True]
    assert equal(before[1:], copies(params[1:]))


@pytest.mark.parametrize("fused", [False, True])
def test_step_without_any_gradient_is_counted_and_teaches_nothing(fused: bool) -> None:
    model = small_model()
    optimizer, plugin = optim.AdamW(model.parameters(), fused=fused), ZClip(warmup_steps=2)
    session = stablekit.attach(optimizer, NonFiniteGuard(), plugin, ClipValue(0.1))
    before, shown = plugin.state_dict(), picture(optimizer)
    optimizer.step()
    assert plugin.state_dict() == before
    assert difference(shown, picture(optimizer)) == ""
    assert (session.number, session.metrics()["grad_norm"]) == (1, 0.0)


def test_frozen_parameters_may_thaw_and_freeze_again() -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = optim.SGD(model.parameters(), lr=0.1), optim.SGD(twin.parameters(), lr=0.1)
    stablekit.attach(optimizer, NonFiniteGuard(), AdaGC(warmup_steps=100, lambda_abs=0.1))
    for step in range(6):
        for net in (model, twin):
            net.zero_grad()
            next(net.parameters()).requires_grad_(step % 2 == 0)
            backward(net, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))


def test_no_parameter_at_all_is_a_step_too() -> None:
    optimizer = optim.SGD([{"params": []}], lr=0.1)
    session = stablekit.attach(
        optimizer, NonFiniteGuard(), ZClip(), AdaGC(), ClipValue(1.0), "agc", "autoclip"
    )
    optimizer.step()
    assert (session.number, session.metrics()["grad_norm"]) == (1, 0.0)


def test_parameters_swapped_in_place_after_attach_are_the_ones_that_count() -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(0.1))
    old = list(model.parameters())
    set_gradients(old, 5.0)
    new = [nn.Parameter(param.detach().clone()) for param in old]
    optimizer.param_groups[0]["params"][:] = new  # as fully_shard does
    set_gradients(new, 1.0)
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in new if p.grad is not None]).norm()
    assert norm == pytest.approx(0.1, rel=1e-4)
    assert all(bool((p.grad == 5.0).all()) for p in old if p.grad is not None)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_dtypes_may_be_mixed(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300, 40).to(dtype)) for dtype in dtypes]
    params.append(nn.Parameter(torch.randn(5, dtype=torch.float64)))
    optimizer, seen = optim.SGD(params, lr=0.1), BeforeUpdate()
    stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(1.0), AdaGC(warmup_steps=1), seen)
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype) * 3
    optimizer.step()
    (after,) = seen.seen
    assert [grad.dtype for grad in after] == [*dtypes, torch.float64]
    norm = torch.stack([grad.double().norm() for grad in after]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-3)
    assert seen.norms == pytest.approx([1.0], rel=1e-5)


def test_complex_gradients_have_the_norm_of_their_parts() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer, seen = optim.SGD([param], lr=1.0), BeforeUpdate()
    session = stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(1.0), seen)
    param.grad = torch.tensor([3 + 4j, 0, 12j], dtype=torch.complex64)
    optimizer.step()
    assert session.metrics()["grad_norm"] == pytest.approx(13.0)
    torch.testing.assert_close(param.detach(), -torch.tensor([3 + 4j, 0, 12j]) / 13)


def test_gradient_of_the_step_stays_as_the_optimizer_saw_it() -> None:
    for fused in (False, True):
        model = small_model()
        optimizer = optim.AdamW(model.parameters(), fused=fused)
        session = stablekit.attach(optimizer, GlobalNorm(0.01), Diary())
        backward(model)
        optimizer.step()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)
        assert session.metrics()["grad_norm_clipped"] == pytest.approx(0.01, rel=1e-4)
