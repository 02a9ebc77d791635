"""A step that raises leaves nothing half-applied, and the next one works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stablekit
from stablekit import Step, hookimpl
from stablekit.errors import PluginError
from tests.core.oracles import (
    X,
    backward,
    copies,
    difference,
    equal,
    gradients,
    picture,
    set_gradients,
    small_model,
)


class Fails:
    """Raises in one hook, in the steps given."""

    def __init__(self, hook: str, *steps: int) -> None:
        self.name = "fails"
        self.steps = steps
        setattr(self, hook, self._raise)

    @hookimpl
    def _raise(self, step: Step) -> None:
        if step.number in self.steps:
            raise KeyError("what it looked for")


@pytest.mark.parametrize("hook", ["observe_gradients", "transform_gradients", "before_update"])
@pytest.mark.parametrize("fused", [False, True])
def test_plugin_that_raises_before_the_update_leaves_everything_as_it_was(
    hook: str, fused: bool
) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    stablekit.attach(optimizer, "global-norm:max_norm=0.1", Fails(hook, 3))
    for step in range(2):
        backward(model, step)
        optimizer.step()
    before = picture(optimizer)
    backward(model, 2)
    raw = gradients(model)
    with pytest.raises(PluginError, match=rf"plugin 'fails' failed in {hook} at step 3: KeyError"):
        optimizer.step()
    assert difference(before, picture(optimizer)) == ""
    if hook != "before_update":  # by then the gradients are the optimizer's
        assert equal(raw, gradients(model))


def test_original_error_is_the_cause() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, Fails("observe_gradients", 1))
    backward(model)
    with pytest.raises(PluginError) as caught:
        optimizer.step()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "hook", ["observe_gradients", "transform_gradients", "after_update", "on_step_end"]
)
def test_step_after_a_plugin_that_raised_works_as_if_attached_afresh(hook: str) -> None:
    model, twin = small_model(), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    stablekit.attach(optimizer, "global-norm:max_norm=0.1", Fails(hook, 1))
    backward(model)
    with pytest.raises(PluginError):
        optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data.copy_(mine.data)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_update_that_was_applied_counts_although_a_plugin_raised_after_it() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, Fails("after_update", 1))
    for step in range(2):
        backward(model, step)
        if step == 0:
            with pytest.raises(PluginError):
                optimizer.step()
        else:
            optimizer.step()
    assert (session.number, session.updates) == (2, 2)


class Breaks(torch.optim.SGD):
    """Raises in the middle of its own arithmetic when told to."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_step_after_an_optimizer_that_raised_starts_clean() -> None:
    model, twin = small_model(), small_model()
    optimizer = Breaks(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard", "global-norm:max_norm=0.1")
    for step in range(4):
        backward(model, step)
        optimizer.broken = step == 1
        if optimizer.broken:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
            continue
        optimizer.step()
        backward(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert (session.number, session.updates) == (4, 3)


def test_gradients_hidden_in_a_skipped_step_come_back_although_it_raised() -> None:
    model = small_model()
    optimizer = Breaks(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard")
    set_gradients(model.parameters(), float("nan"), 1.0)
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    session.detach()
    assert [p.grad is None for p in model.parameters()] == [False] * 4


def test_what_was_lent_to_a_fused_optimizer_comes_back_although_it_raised() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]  # as a GradScaler does
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    session = stablekit.attach(optimizer, "global-norm:max_norm=0.1")
    backward(model)
    optimizer.param_groups[0]["betas"] = "no betas"
    with pytest.raises(ValueError, match="too many values"):
        optimizer.step()
    session.detach()
    assert optimizer.grad_scale == 4.0  # type: ignore[attr-defined]
    assert optimizer.found_inf == 0.0  # type: ignore[attr-defined]


def test_closure_that_raises_leaves_the_next_step_clean() -> None:
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard", "global-norm")

    def fails() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(fails)
    before = copies(model.parameters())
    optimizer.step(lambda: _with_grad(model))
    assert not equal(before, copies(model.parameters()))
    assert session.updates == 1


def _with_grad(model: torch.nn.Module) -> float:
    model.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    return float(loss.detach())
