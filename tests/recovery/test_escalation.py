"""Escalation answers trouble that persists with more than it answered before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import stablekit
from stablekit.errors import AttachError, DivergenceError
from stablekit.testing import CHECKS
from stablekit_recovery import Escalation, LRBackoff, Rollback, SkipSpikes
from tests.recovery.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit.testing import Factory

GOOD = [2.0, 2.1, 1.9, 2.05, 1.95] * 8
HIGH = [20.0, 21.0, 19.0, 20.5, 19.5] * 8

modes = pytest.mark.parametrize(
    "options", [{}, {"device_mode": True, "fused": True, "log_every": 1}], ids=["host", "device"]
)


def escalation(**changes: Any) -> Escalation:  # noqa: ANN401 - arguments of Escalation
    parts: dict[str, Any] = {
        "skip": SkipSpikes(window=16, warmup_steps=4, max_consecutive=2),
        "backoff": LRBackoff(0.5, recovery=1000, cooldown=0),
        "rollback": Rollback(
            5, calm=2, patience=100, max_skips=6, window=16, cooldown=0, max_rollbacks=2
        ),
    }
    return Escalation(**{**parts, **changes})


@modes
def test_a_spike_is_skipped_and_nothing_more(options: dict[str, Any]) -> None:
    run = Stream(escalation(), **options)
    run.losses([*GOOD, 90.0, *GOOD, 90.0, 80.0, *GOOD])
    assert run.kinds() == ["skip"] * 3
    assert run.session.lr_factors == {"escalation": 1.0}


@modes
def test_spikes_that_persist_lower_the_rate(options: dict[str, Any]) -> None:
    run = Stream(escalation(), **options)
    run.losses([*GOOD, *HIGH[:3]])
    assert run.kinds() == ["skip", "skip", "level-shift", "lr-backoff"]
    assert run.session.lr_factors == {"escalation": pytest.approx(0.5, rel=1e-2)}
    if not options:  # on a device the host hears of it when the step is over
        assert run.weight == -40.5


@modes
def test_a_rate_lowered_in_vain_leads_back_to_a_snapshot(options: dict[str, Any]) -> None:
    run = Stream(escalation(), **options)
    run.losses(GOOD)
    for size, steps in ((10.0, 12), (100.0, 12), (1000.0, 3)):
        assert "rollback" not in run.kinds()
        run.losses([size * loss for loss in GOOD[:steps]])
    (event,) = run.events("rollback")
    assert event.data["reason"] == "the learning rate was lowered 2 times in vain"
    assert event.data["to_step"] <= 40
    assert run.kinds().count("lr-backoff") == 3
    assert 0.125 < run.session.lr_factors["escalation"] < 0.15


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (SkipSpikes(name="mine"), r"Escalation\(skip=SkipSpikes"),
        (LRBackoff(), r"Escalation\(backoff=LRBackoff"),
        (Rollback(), r"Escalation\(rollback=Rollback"),
    ],
)
def test_a_part_attached_a_second_time_is_refused(other: stablekit.Plugin, part: str) -> None:
    for chain in ([other, escalation()], [escalation(), other]):
        with pytest.raises(AttachError, match=f"{other.name}.*{part}"):
            Stream(*chain)


def test_the_windows_go_back_with_the_run() -> None:
    plugin = escalation()
    run = Stream(plugin)
    run.losses([*GOOD, *HIGH[:10]])
    plugin.rollback.request("now")
    run.step(1.0, 20.0)
    (event,) = run.events("rollback")
    kept = plugin.state_dict()["skip.loss"].tolist()
    assert kept == pytest.approx(GOOD[event.data["to_step"] - 16 : event.data["to_step"]])
    assert not run.step(1.0, 20.0)


def test_each_return_goes_on_more_slowly() -> None:
    plugin = escalation()
    run = Stream(plugin)
    run.losses(GOOD)
    rates = []
    for _ in range(2):
        plugin.rollback.request("test")
        run.step(1.0, 2.0)
        rates.append(run.session.lr_factors["escalation"])
    assert rates == pytest.approx([0.5, 0.25], abs=0.01)


@modes
def test_a_burst_of_nan_leads_back_and_at_last_it_stops(options: dict[str, Any]) -> None:
    run = Stream(escalation(), **options)
    run.losses(GOOD)
    with pytest.raises(DivergenceError, match="after 2 rollbacks that did not get it past"):
        run.go([math.nan] * 100)
    assert len(run.events("rollback")) == 3
    assert run.session.number == 40 + 3 * 6
    assert math.isfinite(run.weight)
    assert run.weight == -run.events("rollback")[-1].data["to_update"]


@modes
def test_a_loss_that_never_comes_down_leads_back_without_any_spike(
    options: dict[str, Any],
) -> None:
    run = Stream(escalation(rollback=Rollback(5, calm=2, patience=10, window=16)), **options)
    run.losses([*GOOD, *(2.0 + 0.05 * k for k in range(200))])
    first = run.events("rollback")[0]
    assert "10 steps in a row were bad" in first.data["reason"]


def test_trouble_in_both_signals_at_once_is_one_trouble() -> None:
    run = Stream(escalation(backoffs=1))
    for loss in GOOD:
        run.step(1 + loss / 10, loss)
    for loss in HIGH[:3]:
        run.step(loss, loss)
    assert run.kinds().count("level-shift") == 2
    assert run.kinds().count("lr-backoff") == 1
    assert run.events("rollback") == []


def test_a_rate_that_has_recovered_starts_the_ladder_again() -> None:
    plugin = escalation(backoff=LRBackoff(0.5, recovery=3, cooldown=0), backoffs=1)
    run = Stream(plugin)
    run.losses(GOOD)
    for size in (10.0, 100.0, 1000.0):
        run.losses([size * loss for loss in GOOD[:12]])
    assert run.kinds().count("lr-backoff") == 3
    assert run.events("rollback") == []


def test_everything_goes_by_one_name() -> None:
    run = Stream(escalation(name="safety"))
    run.losses([*GOOD, *HIGH[:3]])
    assert {event.plugin for event in run.events() if event.plugin} == {"safety"}
    keys = {key for key in run.session.metrics() if "/" in key}
    assert keys == {
        f"safety/{key}"
        for key in (
            *("skipped", "threshold", "loss_threshold"),
            *("factor", "snapshots", "age", "rollbacks"),
        )
    }


def test_plain_values_make_the_parts() -> None:
    plugin = Escalation(sigma=4, window=64, factor=0.3, every=50, max_rollbacks=1, backoffs=3)
    assert (plugin.skip.sigma, plugin.skip.window, plugin.skip.max_consecutive) == (4.0, 64, 5)
    assert (plugin.backoff.factor, plugin.backoff.recovery) == (0.3, 100)
    assert (plugin.rollback.every, plugin.rollback.max_rollbacks) == (50, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"skip": SkipSpikes(), "sigma": 4.0}, ValueError, "sigma and skip cannot both be given"),
        ({"backoff": "lr-backoff"}, TypeError, "backoff must be a LRBackoff, got 'lr-backoff'"),
        ({"every": 0}, ValueError, "every must be"),
        ({"backoffs": 0}, ValueError, "backoffs must be"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Escalation(**arguments)


@modes
@pytest.mark.parametrize("cut", range(1, 56, 7))
def test_a_run_resumed_anywhere_answers_alike(cut: int, options: dict[str, Any]) -> None:
    def make() -> Stream:
        skip = SkipSpikes(window=16, warmup_steps=4, max_consecutive=2)
        backoff = LRBackoff(0.5, recovery=20, cooldown=0)
        rollback = Rollback(1, keep=1, calm=1, patience=100, max_skips=6, window=16)
        plugin = Escalation(skip=skip, backoff=backoff, rollback=rollback)
        return Stream(plugin, make=torch.optim.AdamW, lr=0.1, **options)

    losses = [*GOOD[:20], 90.0, *HIGH[:12], math.nan, *(10 * loss for loss in HIGH[:20]), 2.0, 2.0]
    straight, first, second = make(), make(), make()
    straight.losses(losses)
    first.losses(losses[:cut])
    second.param.data.copy_(first.param.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.losses(losses[cut:])
    assert torch.equal(second.param, straight.param)
    assert str(second.session.state_dict()) == str(straight.session.state_dict())
    assert second.session.metrics() == straight.session.metrics()


def test_it_says_nothing_odd_about_its_own_checkpoint() -> None:
    first, second = Stream(escalation()), Stream(escalation())
    first.losses(GOOD)
    second.session.load_state_dict(first.session.state_dict())  # warnings are errors here
    assert str(second.session.state_dict()) == str(first.session.state_dict())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("factory", [Escalation, Escalation.example], ids=["usual", "example"])
def test_the_contract_is_kept(check: Callable[[Factory], None], factory: Factory) -> None:
    check(factory)


def test_hooks_are_called_through_it_only() -> None:
    assert stablekit.hookspecs.hooks_of(Escalation) == (
        "on_attach",
        "observe_gradients",
        "on_step_end",
        "on_event",
        "on_detach",
    )
