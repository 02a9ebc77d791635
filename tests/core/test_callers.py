"""Whoever calls ``step``, and through whatever, one step is one step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import stablekit
from stablekit.errors import StateWarning
from stablekit_clipping import GlobalNorm
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    BeforeUpdate,
    Diary,
    backward,
    copies,
    difference,
    equal,
    parameters_after,
    picture,
    small_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
def test_step_with_which_dcp_makes_state_is_no_step(make: Callable[..., optim.Optimizer]) -> None:
    model = small_model()
    optimizer, diary = make(model.parameters(), lr=0.1), Diary()
    session = stablekit.attach(optimizer, diary, NonFiniteGuard())
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())
    set_optimizer_state_dict(model, optimizer, state)
    assert diary.pages == ["on_attach"]
    assert session.number == 0
    backward(model)
    with pytest.warns(StateWarning, match="no stablekit state"):
        optimizer.step()
    get_optimizer_state_dict(model, optimizer)
    assert session.number == 1


def test_step_with_learning_rate_zero_is_a_step() -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.0)
    session = stablekit.attach(optimizer, GlobalNorm(0.1))
    backward(model)
    optimizer.step()
    assert (session.number, session.updates) == (1, 1)


class Sub(optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("base_first", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_subclass_that_calls_its_base_fires_once(base_first: bool, skip: bool) -> None:
    class Base(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Derived(Base):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    if base_first:
        Base([torch.zeros(1)], lr=0.1)
    model = small_model()
    optimizer, diary = Derived(model.parameters(), lr=0.1, momentum=0.9), Diary()
    session = stablekit.attach(optimizer, NonFiniteGuard(), diary)
    for step in range(3):
        backward(model, step, gain=math.nan if skip and step == 1 else 1.0)
        shown = picture(optimizer)
        optimizer.step()
        assert (difference(shown, picture(optimizer)) == "") == (skip and step == 1)
    assert diary.steps[-1][0] == session.number == 3
    assert diary.pages.count("observe_gradients") == 3


def test_closure_of_a_subclass_that_calls_its_base_is_evaluated_and_seen_once() -> None:
    optim.AdamW([torch.zeros(1)])
    model = small_model()
    optimizer, diary = Sub(model.parameters()), Diary()
    stablekit.attach(optimizer, diary)
    optimizer.step(lambda: backward(model))
    assert diary.pages.count("transform_gradients") == 1


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own deprecations
def test_compiled_step_is_seen_every_time() -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = optim.SGD(model.parameters(), lr=0.1), optim.SGD(twin.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(0.5))
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(4):
        backward(model, step)
        compiled()
        backward(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))
    assert (session.number, session.updates) == (4, 4)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_scheduler_before_or_after_attach_makes_no_difference(scheduler_first: bool) -> None:
    model, twin = small_model(), small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    other = optim.lr_scheduler.StepLR(plain, 2, gamma=0.5)
    if scheduler_first:
        mine = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(0.5))
    if not scheduler_first:
        mine = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for step in range(6):
        backward(model, step, gain=math.nan if step == 3 else 1.0)
        optimizer.step()
        mine.step()
        if step != 3:
            backward(twin, step)
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            plain.step()
        other.step()
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))


def test_hooks_of_others_before_and_after_ours_see_the_step_too() -> None:
    model = small_model()
    optimizer, heard = optim.SGD(model.parameters(), lr=0.1), list[str]()
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    session = stablekit.attach(optimizer, NonFiniteGuard(), BeforeUpdate())
    optimizer.register_step_pre_hook(lambda *_: heard.append("after"))
    optimizer.register_step_post_hook(lambda *_: heard.append("post"))
    for gain in (1.0, math.nan):
        backward(model, gain=gain)
        optimizer.step()
    assert heard == ["before", "after", "post"] * 2
    session.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == 2


def test_step_under_gradient_mode_leaves_no_graph() -> None:
    model, twin = small_model(), small_model()
    optimizer = stablekit.wrap(optim.SGD(model.parameters(), lr=0.1), GlobalNorm(1e6))
    plain = optim.SGD(twin.parameters(), lr=0.1)
    with torch.enable_grad():
        assert equal(parameters_after(2, optimizer, model), parameters_after(2, plain, twin))
    norm: Tensor | float = stablekit.session(optimizer).latest._latest["grad_norm"]
    assert isinstance(norm, Tensor)
    assert not norm.requires_grad
