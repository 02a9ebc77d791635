"""ActivationMonitor names the first module whose output is not finite in a step that went bad."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from stablekit_monitors import ActivationMonitor
from tests.monitors.watched import Run, Transformer, backward, words

if TYPE_CHECKING:
    from collections.abc import Callable

ACTIVE = ("nonfinite-activation", "nonfinite-backward")
modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])


class Fault(nn.Module):
    """Puts out what it takes, or a number in one place."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        if self.value == 0.0:
            return x
        return torch.cat([x[:-1], x[-1:] * self.value])


def chain(*faults: float) -> nn.Sequential:
    """Return layers with a fault behind each."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for value in faults for m in (nn.Linear(3, 3), Fault(value))))


def one_step(run: Run, *batches: Tensor) -> None:
    run.optimizer.zero_grad()
    for batch in batches:
        run.model(batch).square().sum().backward()
    run.optimizer.step()


def told(run: Run) -> list[tuple[int, str, str]]:
    """Return step, module and value of what was said."""
    events = [event for kind in ACTIVE for event in run.events(kind)]
    return [(e.step, e.data.get("module", ""), e.data.get("value", "")) for e in events]


@modes
@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_the_first_module_in_the_order_of_execution_is_named(
    value: float, word: str, device_mode: bool
) -> None:
    model = chain(0.0, value, 0.0, math.nan)
    run = Run("nonfinite-guard", ActivationMonitor(), model=model, device_mode=device_mode)
    one_step(run, torch.ones(2, 3))
    assert told(run) == [(1, "3", word)]


def test_order_is_that_of_execution_and_not_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), Fault(math.nan)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.last(self.first(x))
            return made

    run = Run("nonfinite-guard", ActivationMonitor(), model=Backwards())
    one_step(run, torch.ones(2, 3))
    assert told(run) == [(1, "first", "nan")]


def test_a_module_that_is_used_twice_is_named_at_the_use_that_was_bad() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.one, self.bad = nn.ReLU(), nn.Linear(3, 3), Fault(math.inf)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.act(self.bad(self.one(self.act(x))))
            return made

    run = Run("nonfinite-guard", ActivationMonitor(), model=Shared())
    one_step(run, torch.ones(2, 3))
    assert told(run) == [(1, "bad", "inf")]


@modes
def test_a_bad_micro_batch_is_found_among_good_ones(device_mode: bool) -> None:
    run = Run("nonfinite-guard", ActivationMonitor(), model=chain(0.0), device_mode=device_mode)
    good, bad = torch.ones(2, 3), torch.full((2, 3), math.nan)
    one_step(run, good, bad, good)
    (event,) = run.events("nonfinite-activation")
    assert (event.data["module"], event.data["forward_pass"]) == ("(input)", 1)


def test_a_loss_inside_the_model_is_its_output() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x).abs()
            return (made - made).log()

    run = Run("nonfinite-guard", ActivationMonitor(), model=WithLoss())
    one_step(run, torch.ones(2, 3))
    assert told(run) == [(1, "(output)", "inf")]


@modes
def test_a_fault_in_the_backward_pass_is_told_apart(device_mode: bool) -> None:
    run = Run("nonfinite-guard", ActivationMonitor(), model=chain(0.0), device_mode=device_mode)
    run.model(torch.ones(2, 3)).sum().backward()
    grad = next(run.model.parameters()).grad
    assert grad is not None
    grad[0, 0] = math.nan
    run.optimizer.step()
    (event,) = run.events("nonfinite-backward")
    # three: what the model takes, its layers 0 and 1, and what it returns
    assert "all 4 outputs" in event.message


@modes
def test_finite_gradients_are_no_reason_to_speak(device_mode: bool) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.side = nn.Linear(3, 3), Fault(math.nan)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            made: Tensor = self.layer(x)
            return made

    run = Run(ActivationMonitor(), model=Hidden(), device_mode=device_mode)
    one_step(run, torch.ones(2, 3))
    assert told(run) == []


@modes
def test_a_sampled_fault_that_passes_is_missed_and_one_that_stays_is_named_next(
    device_mode: bool,
) -> None:
    monitor = ActivationMonitor(4)
    run = Run("nonfinite-guard", monitor, model=chain(0.0), device_mode=device_mode, log_every=1)
    good, bad = torch.ones(2, 3), torch.full((2, 3), math.nan)
    for batch in (good, bad, good, bad, bad, good, bad):
        one_step(run, batch)
    # 4 is sampled; 5 and 6 follow a bad step; 2 and 7 are missed
    assert [step for step, _, _ in told(run)] == [4, 5]


def test_a_bad_step_that_was_not_looked_at_arms_the_next_one() -> None:
    run = Run("nonfinite-guard", ActivationMonitor(100), model=chain(0.0))
    bad = torch.full((2, 3), math.nan)
    for _ in range(3):
        one_step(run, bad)
    assert [step for step, _, _ in told(run)] == [2, 3]


@pytest.mark.parametrize("checkpointing", ["", "plain", "reentrant"])
def test_blocks_are_looked_at_with_gradient_checkpointing_too(checkpointing: str) -> None:
    model = Transformer(checkpointing)
    run = Run("nonfinite-guard", ActivationMonitor(), model=model)
    with torch.no_grad():
        model.blocks[1].mlp[0].bias[0] = math.nan  # type: ignore[index, union-attr]
    run.step()
    assert told(run) == [(1, "blocks.1.mlp.0", "nan")]


def test_a_pattern_chooses_what_is_looked_at() -> None:
    run = Run("nonfinite-guard", ActivationMonitor(watch="blocks.*"))
    with torch.no_grad():
        run.model.embed.weight.fill_(math.nan)
    run.step()
    assert told(run) == [(1, "blocks.0", "nan")]


def children_one_by_one(run: Run) -> None:
    x = words(3)
    model: Transformer = run.model
    hidden = model.embed(x)
    for block in model.blocks:
        hidden = block(hidden)
    model.head(hidden).square().sum().backward()


@pytest.mark.parametrize("call", [lambda run: backward(run.model), children_one_by_one])
def test_a_model_whose_children_are_called_is_looked_at_child_by_child(
    call: Callable[[Run], None],
) -> None:
    run = Run("nonfinite-guard", ActivationMonitor())
    with torch.no_grad():
        run.model.head.bias[0] = math.nan
    call(run)
    run.optimizer.step()
    assert told(run) == [(1, "head", "nan")]


def test_a_forward_pass_that_raises_is_not_mixed_with_the_next() -> None:
    model = chain(math.nan, 0.0)
    run = Run("nonfinite-guard", ActivationMonitor(), model=model)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    model[1].value = 0.0  # type: ignore[assignment]
    run.model(torch.full((2, 3), math.nan)).sum().backward()
    run.optimizer.step()
    (event,) = run.events("nonfinite-activation")
    assert (event.data["module"], event.data["forward_pass"]) == ("(input)", 1)
