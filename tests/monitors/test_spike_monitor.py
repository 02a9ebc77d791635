"""SpikeMonitor reports every spike once, names who made it, and changes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from stablekit import hookimpl
from stablekit.testing import CHECKS
from stablekit_monitors import SpikeMonitor
from tests.monitors.spike_run import NAMES, NOISE, Run, SkipNow

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Event, Step
    from stablekit.testing import Factory

modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])

VARIANTS: dict[str, Factory] = {
    "example": SpikeMonitor.example,
    "loss only": lambda: SpikeMonitor(signals="loss", warmup_steps=2),
    "with updates": lambda: SpikeMonitor(warmup_steps=3, patience=3, update_every=2),
    "names nobody": lambda: SpikeMonitor(warmup_steps=3, top=0),
}


def kinds(run: Run) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in run.events()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None], variant: str) -> None:
    check(VARIANTS[variant])


@modes
def test_a_usual_run_says_nothing(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(100)
    assert run.events() == []
    metrics = run.session.metrics()
    assert abs(metrics["spike-monitor/score"]) < 6
    assert metrics["spike-monitor/loss_baseline"] == pytest.approx(2.0, rel=0.1)
    assert metrics["spike-monitor/norm_baseline"] == pytest.approx(3.0, rel=0.1)
    assert metrics["spike-monitor/norm_limit"] > 1.3 * 3


@modes
def test_a_spike_of_one_tensor_names_it_with_its_score(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(40)
    run.step(grads=(1.0, 30.0, 1.0))
    run.usual(5)
    (spike,) = run.events("spike")
    assert (spike.step, spike.tensors) == (41, ("middle",))
    assert spike.data["signal"] == "norm"
    assert spike.data["severity"] == "severe"
    assert spike.data["value"] == pytest.approx(30 * math.sqrt(3), rel=0.2)
    assert spike.data["baseline"] == pytest.approx(3.0, rel=0.1)
    assert spike.data["score"] > 12
    (own,) = spike.data["tensor_scores"]
    assert own == pytest.approx(math.log(30) / (1.2 * NOISE), rel=0.5)
    assert "middle" in spike.message


@modes
def test_tensors_come_worst_first_by_their_own_score_and_not_by_their_norm(
    device_mode: bool,
) -> None:
    run = Run(device_mode=device_mode)
    for _ in range(40):
        run.step(grads=(100.0, 1.0, 1.0))
    run.step(grads=(200.0, 5.0, 40.0))
    (spike,) = run.events("spike")
    assert spike.tensors == ("head", "middle", "embed")
    assert spike.data["tensor_scores"] == sorted(spike.data["tensor_scores"], reverse=True)


def test_at_most_top_tensors_are_named() -> None:
    run = Run(monitor=SpikeMonitor(warmup_steps=10, top=2)).usual(40)
    run.step(grads=(50.0, 30.0, 40.0))
    assert run.events("spike")[0].tensors == ("embed", "head")


@modes
def test_a_spike_of_the_loss_alone_names_no_tensor(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(40)
    run.step(loss=9.0)
    (spike,) = run.events("spike")
    assert (spike.data["signal"], spike.tensors) == ("loss", ())
    assert spike.data["value"] == pytest.approx(9.0, rel=0.2)


@modes
def test_a_long_spike_is_two_events(device_mode: bool) -> None:
    monitor = SpikeMonitor(warmup_steps=10, patience=20, merge_steps=3)
    run = Run(device_mode=device_mode, monitor=monitor).usual(30)
    for loss in (6.0, 9.0, 2.0, 12.0, 2.0, 2.0, 7.0):
        run.step(loss=loss)
    run.usual(10)
    assert kinds(run) == [("spike", 31), ("spike-end", 40)]
    end = run.events("spike-end")[0].data
    assert (end["signal"], end["start"], end["length"], end["peak_step"]) == ("loss", 31, 4, 34)
    assert end["peak"] == pytest.approx(12.0, rel=0.2)


@modes
def test_a_spike_that_worsens_is_said_once_more(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(60)
    for loss in (3.0, 3.0, 30.0, 30.0):
        run.step(loss=loss)
    said = [(e.step, e.data["severity"]) for e in run.events("spike")]
    assert said == [(61, "mild"), (63, "severe")]


@modes
@pytest.mark.parametrize("factor", [5.0, 0.1])
def test_a_shift_of_the_level_is_accepted_after_patience_and_watched_from_there(
    device_mode: bool, factor: float
) -> None:
    run = Run(device_mode=device_mode).usual(40)
    for _ in range(30):
        run.step(loss=2.0 * factor)
    run.step(loss=20.0 * factor)
    run.usual(0)
    up = [("spike", 41)] if factor > 1 else []
    assert kinds(run) == [*up, ("level-shift", 45), ("spike", 71)]
    shift = run.events("level-shift")[0].data
    assert shift["value"] == pytest.approx(2.0 * factor, rel=0.2)
    assert 1.2 < shift["baseline"] < 2.2  # a fall is followed while it is doubted
    assert shift.get("start") == (41 if factor > 1 else None)


@modes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 30])
def test_a_loss_that_is_not_finite_is_one_severe_spike_even_in_the_warmup(
    device_mode: bool, bad: float, at: int
) -> None:
    run = Run(device_mode=device_mode).usual(at - 1)
    for _ in range(4):
        run.step(loss=bad)
    run.usual(8)
    assert kinds(run) == [("spike", at), ("spike-end", at + 6)]
    assert run.events("spike")[0].data["severity"] == "severe"
    assert run.events("spike-end")[0].data["peak"] == math.inf


@modes
def test_a_gradient_that_is_not_finite_is_the_sessions_event(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(30)
    for bad in (math.nan, math.inf, 3e38):
        run.step(grads=(1.0, bad, 1.0))
    run.usual(3)
    assert run.events() == []
    assert [e.kind for e in run.session.events] == ["nonfinite"] * 3


@modes
def test_a_nan_in_loss_and_gradient_names_the_tensor(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(30)
    run.step(loss=math.nan, grads=(1.0, math.nan, 1.0))
    (spike,) = run.events("spike")
    assert spike.tensors == ("middle",)


@modes
def test_a_skipped_step_is_watched_and_teaches_nothing(device_mode: bool) -> None:
    skip = SkipNow()
    run = Run(skip, device_mode=device_mode).usual(30)
    before = run.state()
    skip.now = True
    run.step(loss=9.0, grads=(1.0, 30.0, 1.0))
    run.step()
    after = run.state()
    assert [e.data["signal"] for e in run.events("spike")] == ["loss", "norm"]
    for ours, theirs in zip(after["signals"], before["signals"], strict=True):
        assert {**ours, "episode": None} == {**theirs, "episode": None}
    assert after["steps"] == before["steps"] == 30
    assert all(torch.equal(after["norms"][n], before["norms"][n]) for n in NAMES)


def test_a_plugin_that_hears_of_a_spike_can_skip_that_very_step() -> None:
    class SkipSpikes:
        name = "skip-spikes-of-the-monitor"
        heard = False

        @hookimpl
        def on_event(self, event: Event) -> None:
            self.heard = event.kind == "spike"

        @hookimpl
        def observe_gradients(self, step: Step) -> None:
            step.skip("a spike", when=self.heard)
            self.heard = False

    run = Run(SkipSpikes(), lr=0.1).usual(30)
    before = [param.clone() for param in run.params]
    run.step(grads=(1.0, 1.0, 100.0))
    assert run.session.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.params, strict=True))


@modes
def test_a_batch_that_was_observed_is_in_the_event(device_mode: bool) -> None:
    run = Run(device_mode=device_mode, log_every=5).usual(30)
    run.session.observe(batch=1234)
    run.step(loss=9.0)
    run.session.observe(batch={"not": "plain"})
    run.step(grads=(9.0, 9.0, 9.0))
    assert [e.data.get("batch") for e in run.events("spike")] == [1234, None]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"threshold": 0.0}, ValueError, "threshold"),
        ({"signals": ("loss", "speed")}, ValueError, "signals must be one of 'loss', 'norm'"),
        ({"signals": ("update",)}, ValueError, "signals"),
        ({"warmup_steps": 0}, ValueError, "warmup_steps"),
        ({"patience": 1}, ValueError, "patience"),
        ({"merge_steps": 0}, ValueError, "merge_steps"),
        ({"top": -1}, ValueError, "top"),
        ({"update_every": 0}, ValueError, "update_every"),
        ({"update_every": 0.5}, TypeError, "update_every"),
    ],
)
def test_a_bad_argument_is_refused(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        SpikeMonitor(**arguments)
