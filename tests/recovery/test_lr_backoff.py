"""LRBackoff lowers learning rates after trouble and lets them come back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import stablekit
from stablekit import hookimpl
from stablekit.errors import NoEffectWarning
from stablekit.testing import CHECKS
from stablekit_recovery import LRBackoff, recovered
from tests.recovery.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stablekit import Event, Step
    from stablekit.testing import Factory


class Trouble:
    """Emits events at the steps it is given."""

    name = "trouble"

    def __init__(self, at: Iterable[int], kind: str = "spike", hook: str = "observe") -> None:
        self.at, self.kind, self.hook = set(at), kind, hook

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        if step.number in self.at and self.hook == "observe":
            step.emit(self.kind)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        if step.number in self.at and self.hook == "end":
            step.emit(self.kind)


def factors(run: Stream, steps: int) -> list[float]:
    """Return by what each step's rate of 1 was multiplied, read from the weight."""
    found = []
    for _ in range(steps):
        before = run.weight
        run.step()
        found.append(before - run.weight)
    return found


def test_the_rate_falls_in_the_step_in_trouble_and_recovers_in_a_straight_line() -> None:
    run = Stream(Trouble([2]), LRBackoff(0.5, recovery=4))
    assert factors(run, 7) == [1.0, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert run.optimizer.param_groups[0]["lr"] == 1.0


def test_trouble_at_the_end_of_a_step_lowers_the_next() -> None:
    run = Stream(Trouble([2], hook="end"), LRBackoff(0.5, recovery=4))
    assert factors(run, 5) == [1.0, 1.0, 0.625, 0.75, 0.875]


def test_a_skipped_step_is_no_recovery() -> None:
    run = Stream("nonfinite-guard", LRBackoff(0.5, recovery=4, cooldown=0))
    run.go([1.0, math.nan])
    assert factors(run, 5) == [0.5, 0.625, 0.75, 0.875, 1.0]


def test_trouble_again_lowers_further_down_to_the_floor() -> None:
    run = Stream(Trouble([1, 2, 3]), LRBackoff(0.25, recovery=1000, cooldown=0, floor=0.1))
    lowered = factors(run, 3)
    assert lowered[0] == 0.25
    assert lowered[1] == pytest.approx(0.1)
    assert lowered[2] == pytest.approx(0.1)
    assert [e.data["factor"] for e in run.events("lr-backoff")] == pytest.approx([0.25, 0.1, 0.1])


def test_the_event_says_from_what_to_what_rates_are_lowered_and_when() -> None:
    run = Stream(Trouble([1, 2]), LRBackoff(0.5, recovery=2, cooldown=0))
    run.go([1.0, 1.0])
    assert [event.message for event in run.events("lr-backoff")] == [
        "learning rates are lowered from 1 to 0.5 times those of the schedule at step 1",
        "learning rates are lowered from 0.75 to 0.375 times those of the schedule at step 2",
    ]


def test_within_the_cooldown_trouble_only_makes_recovery_start_over() -> None:
    run = Stream(Trouble([1, 3]), LRBackoff(0.5, recovery=4, cooldown=2))
    assert factors(run, 7) == pytest.approx([0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0])
    assert len(run.events("lr-backoff")) == 1


def test_several_events_of_one_step_are_one_trouble() -> None:
    plugin = LRBackoff(0.5, recovery=10, cooldown=0)
    other = Trouble([1])
    other.name = "other"
    run = Stream(Trouble([1]), other, plugin)
    assert factors(run, 1) == [0.5]


def test_only_the_kinds_asked_for_are_trouble() -> None:
    run = Stream(Trouble([1], kind="weather"), Trouble2([3]), LRBackoff(0.5, on="storm+flood"))
    assert factors(run, 4) == [1.0, 1.0, 0.5, pytest.approx(0.505)]


class Trouble2(Trouble):
    name = "trouble2"

    def __init__(self, at: Iterable[int]) -> None:
        super().__init__(at, kind="flood")


def test_its_own_events_are_no_trouble() -> None:
    run = Stream(Trouble([1]), LRBackoff(0.5, recovery=10, cooldown=0, on="spike+lr-backoff"))
    assert factors(run, 1) == [0.5]


def test_the_factor_of_the_step_is_a_metric() -> None:
    run = Stream(Trouble([2]), LRBackoff(0.5, recovery=2))
    told = []
    for _ in range(4):
        run.step()
        told.append(run.session.metrics()["lr-backoff/factor"])
    assert told == [1.0, 0.5, 0.75, 1.0]


def test_a_chainable_scheduler_goes_its_own_way() -> None:
    run = Stream(Trouble([2, 5]), LRBackoff(0.5, recovery=3, cooldown=0))
    scheduler = lr_scheduler.ExponentialLR(run.optimizer, 0.9)
    for step in range(8):
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.9**step)
        run.step()
        scheduler.step()


def test_all_groups_of_all_optimizers_are_lowered() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}]
    one = optim.SGD(groups, lr=1.0)
    other = optim.SGD([params[2]], lr=torch.tensor(2.0))
    stablekit.attach([one, other], Trouble([1]), LRBackoff(0.5))
    for param in params:
        param.grad = torch.ones(1)
    for optimizer in (one, other):
        optimizer.step()
    assert [param.item() for param in params] == [-0.5, -0.25, -1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_on_a_device_the_rate_falls_when_the_event_arrives(fused: bool) -> None:
    plugin = LRBackoff(0.5, recovery=1000)
    run = Stream("nonfinite-guard", plugin, device_mode=True, log_every=4, fused=fused)
    run.step(math.nan)
    assert factors(run, 5) == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("options", [{}, {"device_mode": True, "fused": True, "log_every": 1}])
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_run_resumed_anywhere_has_the_same_rates(cut: int, options: dict[str, Any]) -> None:
    def make() -> Stream:
        plugins = ("nonfinite-guard", LRBackoff(0.3, recovery=5, cooldown=2))
        return Stream(*plugins, make=optim.AdamW, lr=0.1, **options)

    norms = [1.0, 2.0, math.nan, 1.0, math.nan, 1.0, 2.0, math.nan, 1.0, 1.0, 1.0, 1.0]
    straight, first, second = make(), make(), make()
    straight.go(norms)
    first.go(norms[:cut])
    second.param.data.copy_(first.param.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.go(norms[cut:])
    assert torch.equal(second.param, straight.param)
    assert str(second.session.state_dict()) == str(straight.session.state_dict())
    assert second.session.lr_factors == straight.session.lr_factors


def test_a_dry_run_changes_no_rate() -> None:
    run = Stream(Trouble([1]), LRBackoff(0.5), dry_run=True)
    assert factors(run, 2) == [1.0, 1.0]
    assert [event.kind for event in run.events("lr-backoff")] == ["lr-backoff"]


def test_detached_it_lowers_nothing_and_attached_again_it_goes_on() -> None:
    plugin = LRBackoff(0.5, recovery=1000)
    run = Stream(Trouble([1]), plugin)
    run.step()
    run.session.detach()
    assert factors(run, 1) == [1.0]
    with stablekit.attach(run.optimizer, plugin):
        assert factors(run, 1) == [0.5]


def test_an_optimizer_without_rates_is_warned_about() -> None:
    class Plain(optim.Optimizer):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            pass

    with pytest.warns(NoEffectWarning, match="no parameter group has a learning rate"):
        stablekit.attach(Plain([torch.zeros(1)], {}), LRBackoff())


def test_recovery_is_a_line_that_ends_at_one() -> None:
    assert [recovered(0.2, k, 4) for k in (0, 1, 4, 9)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert recovered(0.2, -3, 4) == 0.2
    assert recovered(0.1, 3, 3) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, "factor must be a number strictly between 0 and 1"),
        ({"factor": 0.01}, "floor must be at most factor"),
        ({"recovery": 0}, "recovery must be an integer of at least 1"),
        ({"cooldown": -1}, "cooldown must be an integer of at least 0"),
        ({"floor": 0}, "floor must be a number strictly between"),
        ({"on": "spike+"}, "on must be words, not empty"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LRBackoff(**arguments)


@pytest.mark.parametrize("change", [{"low": 0.0}, {"low": 1.1}, {"since": -1}, {"last": -2}])
def test_a_bad_state_is_refused(change: dict[str, Any]) -> None:
    plugin = LRBackoff()
    before = plugin.state_dict()
    with pytest.raises(ValueError, match=next(iter(change))):
        plugin.load_state_dict({**before, **change})
    assert plugin.state_dict() == before


def test_events_may_come_from_the_session_itself() -> None:
    seen: list[Event] = []

    class Ear:
        name = "ear"

        @hookimpl
        def on_event(self, event: Event) -> None:
            seen.append(event)

    run = Stream("nonfinite-guard", LRBackoff(0.5, on="nonfinite"), Ear())
    run.step(math.nan)
    assert [event.kind for event in seen] == ["nonfinite", "lr-backoff", "skip"]
    assert run.session.lr_factors == {"lr-backoff": 0.5}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract_is_kept(check: Callable[[Factory], None]) -> None:
    check(LRBackoff)
