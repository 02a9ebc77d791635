"""Of optimizers around optimizers the outermost one with native hooks is attached."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn, optim

import stablekit
from stablekit.errors import AttachError, StateWarning
from stablekit_clipping import GlobalNorm
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import Diary, backward, copies, difference, picture, small_model


class Around(optim.Optimizer):
    """Shaped as AcceleratedOptimizer: an Optimizer that never called its constructor."""

    def __init__(self, inner: object, name: str) -> None:
        setattr(self, name, inner)
        self._inner = name

    def step(self, closure: Any = None) -> Any:
        getattr(self, self._inner).step()


@pytest.mark.parametrize("name", ["optimizer", "optim", "original_optimizer"])
def test_wrappers_without_native_hooks_are_looked_through(name: str) -> None:
    model = small_model()
    inner = optim.SGD(model.parameters(), lr=0.1)
    wrapper = Around(Around(inner, name), "optimizer")
    session = stablekit.attach(wrapper, GlobalNorm(0.1))
    assert session.optimizers == (inner,)
    assert stablekit.session(wrapper) is stablekit.session(inner) is session
    backward(model)
    wrapper.step()
    assert session.number == 1
    with pytest.raises(AttachError, match="already"):
        stablekit.attach(inner, GlobalNorm(0.1))


class Lookahead(optim.Optimizer):
    """Steps an inner optimizer, then moves the weights halfway to the slow ones."""

    def __init__(self, inner: optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.optimizer = inner
        self.param_groups = inner.param_groups
        self.slow = copies(p for group in self.param_groups for p in group["params"])
        self.rounds = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.rounds += 1
        params = [p for group in self.param_groups for p in group["params"]]
        for param, slow in zip(params, self.slow, strict=False):
            param.data.lerp_(slow, 0.5)
        return loss


@pytest.mark.parametrize("scheduled", [False, True])
def test_optimizer_with_hooks_around_another_is_attached_outside(scheduled: bool) -> None:
    model = small_model()
    inner = optim.AdamW(model.parameters())
    if scheduled:
        optim.lr_scheduler.LambdaLR(inner, lambda epoch: 1.0)
    optimizer, diary = Lookahead(inner), Diary()
    session = stablekit.attach(optimizer, NonFiniteGuard(), diary)
    assert session.optimizers == (optimizer,)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    backward(model, gain=math.nan)
    shown = picture(optimizer)
    optimizer.step()
    assert difference(shown, picture(optimizer)) == ""
    assert diary.pages.count("after_update") == 3
    assert not inner._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:the optimizer already has state")  # it makes some at once
@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "TRAC"])
def test_wrappers_of_pytorch_optimizer_are_attached_outside(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    model = small_model()
    optimizer = getattr(library, name)(optim.AdamW(model.parameters(), lr=0.01))
    if name == "ScheduleFreeWrapper":
        optimizer.train()
    diary = Diary()
    with pytest.warns(StateWarning, match="save session.state_dict"):
        session = stablekit.attach(optimizer, NonFiniteGuard(), GlobalNorm(0.1), diary)
    assert session.optimizers == (optimizer,)
    for step in range(4):
        backward(model, step, gain=math.nan if step in (0, 2) else 1.0)
        shown = picture(optimizer)
        optimizer.step()
        assert (difference(shown, picture(optimizer)) == "") == (step in (0, 2))
    assert diary.pages.count("after_update") == 2
    session.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_hooks_that_would_never_fire_are_not_taken_for_native_ones() -> None:
    model = small_model()
    inner = optim.SGD(model.parameters(), lr=0.1)
    wrapper: Any = Around(inner, "optimizer")
    wrapper._optimizer_step_pre_hooks = {}
    session = stablekit.attach(wrapper, GlobalNorm(0.1))
    backward(model)
    wrapper.step()
    assert session.number == 1


@pytest.mark.parametrize("engine", ["DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper"])
def test_engines_that_step_by_themselves_are_refused_by_name(engine: str) -> None:
    wrapper = type(engine, (Around,), {})(optim.SGD([torch.zeros(1)]), "optimizer")
    with pytest.raises(AttachError, match=engine):
        stablekit.attach(wrapper, GlobalNorm(0.1))


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(1, 1), "adamw"])
def test_what_is_no_optimizer_is_refused(thing: object) -> None:
    with pytest.raises(AttachError, match=r"expected a torch.optim.Optimizer"):
        stablekit.attach(thing, GlobalNorm(0.1))
