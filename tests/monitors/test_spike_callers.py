"""SpikeMonitor in either mode, after a resume, under every kind of step, and whatever comes."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stablekit
from stablekit_monitors import SpikeMonitor
from stablekit_monitors.spike_monitor import own_scores
from tests.monitors.spike_run import NAMES, Run, SkipNow

if TYPE_CHECKING:
    from stablekit import Event

modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])


@modes
def test_without_a_loss_the_norm_is_watched(device_mode: bool) -> None:
    run = Run(device_mode=device_mode)
    for i in range(40):
        for param in run.params:
            param.grad = torch.full_like(param, 50.0 if i == 35 else 1.0)
        run.optimizer.step()
    (spike,) = run.events("spike")
    assert (spike.step, spike.data["signal"]) == (36, "norm")
    assert "spike-monitor/loss_score" not in run.session.metrics()


@modes
def test_steps_without_a_gradient_are_no_steps(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(20)
    before = run.state()
    for param in run.params:
        param.grad = None
    run.session.observe(loss=torch.tensor(50.0))
    run.optimizer.step()
    assert run.events() == []
    assert run.state()["signals"] == before["signals"]


@modes
def test_only_restricts_the_norms_and_the_names(device_mode: bool) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in NAMES})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watched = stablekit.only(SpikeMonitor(warmup_steps=5), include=["head*", "middle*"])
    session = stablekit.attach(optimizer, watched, model=model, device_mode=device_mode)
    for i in range(30):
        for name in NAMES:
            high = (name, i) in (("embed", 20), ("middle", 25))
            weight = model.get_parameter(f"{name}.weight")
            weight.grad = torch.full_like(weight, 90.0 if high else 1.0)
        optimizer.step()
    session.metrics()
    assert [(e.step, e.tensors) for e in session.events] == [(26, ("middle.weight",))]


@modes
def test_a_parameter_that_joins_is_watched_like_the_others(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(20)
    late = nn.Parameter(torch.zeros(2))
    run.optimizer.add_param_group({"params": [("late", late)]})
    run.params.append(late)
    for i in range(25):
        late.grad = torch.full_like(late, 60.0 if i == 20 else 1.0)
        run.params = run.params[:3]
        run.step()
    (spike,) = run.events("spike")
    assert (spike.step, spike.tensors) == (41, ("late",))


@modes
def test_the_update_is_measured_where_asked_for(device_mode: bool) -> None:
    monitor = SpikeMonitor(signals=(), warmup_steps=4, update_every=2)
    run = Run(device_mode=device_mode, monitor=monitor, lr=0.01)
    assert monitor.needs == ("parameters",)
    expected = []
    for i in range(20):
        run.optimizer.param_groups[0]["lr"] = 1.0 if i == 15 else 0.01
        before = [param.detach().clone() for param in run.params]
        run.step()
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(run.params, before, strict=True)]
        ).norm()
        metrics = run.session.metrics()
        if i % 2 == 1:
            expected.append(moved.item())
        if i == 1:
            assert metrics["spike-monitor/update_baseline"] == pytest.approx(moved.item(), rel=1e-4)
    assert [(e.kind, e.step, e.data["signal"]) for e in run.events("spike")] == [
        ("spike", 16, "update")
    ]
    assert run.events("spike")[0].data["value"] == pytest.approx(expected[7], rel=1e-5)
    assert set(run.events("spike")[0].tensors) <= set(NAMES)


def test_nothing_is_copied_and_nothing_is_needed_unless_asked_for() -> None:
    monitor = SpikeMonitor()
    assert monitor.needs == ()
    assert not hasattr(monitor, "before_update")
    run = Run(monitor=monitor).usual(3)
    assert run.state()["update_norms"] == {}


@modes
def test_a_run_resumed_in_a_spike_goes_on_with_the_same_bits(device_mode: bool) -> None:
    def spiking(run: Run, first: int, last: int) -> Run:
        for i in range(first, last):
            high = i in (41, 42, 43, 45, 70, 80)
            run.step(loss=12.0 if high else 2.0, grads=(1.0, 1.0, 25.0 if high else 1.0))
        return run

    straight, first = (spiking(Run(device_mode=device_mode), 0, 43) for _ in range(2))
    buffer = io.BytesIO()
    torch.save(first.optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = Run(device_mode=device_mode)
    resumed.noise.set_state(first.noise.get_state())
    resumed.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    said = []
    for run in (straight, resumed):
        spiking(run, 43, 100)
        said.append([event.as_dict() for event in run.events()])
    assert said[0] == said[1]
    assert [e["kind"] for e in said[0]].count("spike-end") == 6
    ours, theirs = resumed.state(), straight.state()
    assert ours["signals"] == theirs["signals"]
    assert all(torch.equal(ours["norms"][n], theirs["norms"][n]) for n in NAMES)


def test_device_mode_says_what_host_mode_says() -> None:
    def eventful(device_mode: bool) -> list[Event]:
        skip = SkipNow()
        run = Run(skip, device_mode=device_mode, log_every=7)
        for i in range(200):
            skip.now = i in (44, 45, 120)
            run.step(
                loss={50: 9.0, 51: math.nan, 90: 12.0}.get(i, 2.0 if i < 130 else 6.0),
                grads=(1.0, 40.0 if i in (45, 60, 61) else 1.0, 3.0 if i in (60, 150) else 1.0),
            )
        return run.events()

    host, device = eventful(False), eventful(True)
    assert len(host) > 8
    for ours, theirs in zip(host, device, strict=True):
        assert (ours.kind, ours.step, ours.tensors) == (theirs.kind, theirs.step, theirs.tensors)
        assert ours.data.keys() == theirs.data.keys()
        for key, value in ours.data.items():
            if isinstance(value, (float, list)):
                assert theirs.data[key] == pytest.approx(value, rel=1e-3, nan_ok=True), key
            else:
                assert theirs.data[key] == value


def test_a_state_of_host_mode_goes_on_in_device_mode() -> None:
    host = Run().usual(30)
    device = Run(device_mode=True)
    device.session.load_state_dict(host.session.state_dict())
    device.step(loss=9.0)
    assert [(e.step, e.data["signal"]) for e in device.events("spike")] == [(31, "loss")]


def test_it_runs_where_no_tensor_has_a_value() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(warmup_steps=2, update_every=2)
    session = stablekit.attach(optimizer, monitor, log_every=100)
    for _ in range(8):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        session.observe(loss=torch.empty((), device="meta"))
        optimizer.step()
    assert session.updates == 8


@modes
def test_a_step_with_an_overflow_found_by_the_scaler_is_no_step(device_mode: bool) -> None:
    run = Run(device_mode=device_mode).usual(20)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = run.state()["signals"]
    scaler.scale(torch.ones((), requires_grad=True))
    for param in run.params:
        param.grad = torch.full_like(param, math.inf)
    run.session.observe(loss=99.0)
    scaler.step(run.optimizer)
    scaler.update()
    run.session.metrics()
    assert [event.kind for event in run.session.events] == ["scaler-skip"]
    assert run.state()["signals"] == state


def test_a_closure_evaluated_many_times_is_one_step() -> None:
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([param], max_iter=6, line_search_fn="strong_wolfe")
    session = stablekit.attach(optimizer, SpikeMonitor(warmup_steps=2))
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = (param**4).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert evaluations > 6
    signals = session.state_dict()["plugins"]["spike-monitor"]["state"]["signals"]
    assert [entry["seen"] for entry in signals] == [3, 3, 0]


FAULTS = st.lists(
    st.tuples(
        st.sampled_from([2.0, 2.0, 2.0, 2.5, 9.0, 1e6, 0.0, -3.0, math.nan, math.inf]),
        st.sampled_from([1.0, 1.0, 1.0, 1.3, 30.0, 1e20, 0.0, math.nan, math.inf]),
        st.booleans(),
    ),
    max_size=40,
)


@modes
@given(faults=FAULTS)
def test_whatever_comes_spikes_begin_and_end_in_turn_and_state_is_sound(
    device_mode: bool, faults: list[tuple[float, float, bool]]
) -> None:
    skip = SkipNow()
    monitor = SpikeMonitor(warmup_steps=3, patience=3, merge_steps=2)
    run = Run(skip, device_mode=device_mode, monitor=monitor).usual(5)
    for loss, grad, skipped in faults:
        skip.now = skipped
        run.step(loss=loss, grads=(1.0, grad, 1.0))
    for signal in ("loss", "norm"):
        is_open, severe = False, False
        for event in (e for e in run.events() if e.data["signal"] == signal):
            if event.kind == "spike":
                assert not is_open or (not severe and event.data["severity"] == "severe")
                is_open, severe = True, event.data["severity"] == "severe"
            elif event.kind == "spike-end":
                assert is_open
                is_open = False
            else:
                assert ("start" in event.data) == is_open
                is_open = False
    for entry in run.state()["signals"]:
        assert all(math.isfinite(v) for k, v in entry.items() if k not in ("signal", "episode"))
    assert all(bool(row.isfinite().all()) for row in run.state()["norms"].values())


def test_own_scores_are_those_of_a_loop_over_tensors() -> None:
    noise = torch.Generator().manual_seed(1)
    past = torch.rand(6, 32, generator=noise).add(0.5)
    past[1, 5:] = 0.0
    past[2, :17] = 0.0
    norms = torch.tensor([1.0, 50.0, 50.0, math.nan, 0.0, math.inf])
    expected = []
    for row, norm in zip(past.tolist(), norms.tolist(), strict=True):
        logs = sorted(math.log(x) for x in row if x > 0)
        middle = logs[(len(logs) - 1) // 2]
        away = sorted(abs(x - middle) for x in logs)[(len(logs) - 1) // 2]
        if not math.isfinite(norm):
            expected.append(math.inf)
        elif len(logs) < 8 or norm <= 0:
            expected.append(0.0)
        else:
            expected.append((math.log(norm) - middle) / (1.4826 * max(away, 0.05)))
    assert own_scores(norms, past).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
