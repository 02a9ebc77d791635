"""Rollback takes a diverging run back, bit for bit, and on with other data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import stablekit
from stablekit.errors import DivergenceError
from stablekit.testing import CHECKS
from stablekit_recovery import NonFiniteGuard, Rollback, SkipSpikes
from tests.core.oracles import difference, picture
from tests.core.test_device_mode import HostReads
from tests.recovery.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Event, Plugin
    from stablekit.testing import Factory

DATA = torch.randn(64, 16, 6, generator=torch.Generator().manual_seed(3))
GOOD = [2.0, 2.1, 1.9, 2.05, 1.95] * 8

MAKERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
    "adamw fused": lambda params: optim.AdamW(params, lr=0.01, fused=True),
    "adamw loop": lambda params: optim.AdamW(params, lr=0.01, foreach=False),
    "sgd momentum": lambda params: optim.SGD(params, lr=0.01, momentum=0.9),
    "tensor lr": lambda params: optim.Adam(params, lr=torch.tensor(0.01), amsgrad=True),
}
BAD = 900
"""A batch of this number or above breaks the gradients; so many are not in the data."""


@final
class Training:
    """A small network with batch norm on named batches, a chain, and a schedule."""

    def __init__(
        self,
        make: Callable[[Any], optim.Optimizer],
        *plugins: Any,  # noqa: ANN401 - any plugin form
        pair: bool = False,
        **options: Any,  # noqa: ANN401 - options of attach
    ) -> None:
        """Build and attach."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        params = list(self.model.parameters())
        self.optimizers = [make(params[:3]), make(params[3:])] if pair else [make(params)]
        self.schedulers = [lr_scheduler.ExponentialLR(one, 0.97) for one in self.optimizers]
        self.session = stablekit.attach(self.optimizers, *plugins, model=self.model, **options)
        for i, scheduler in enumerate(self.schedulers):
            self.session.track(**{f"scheduler{i}": scheduler})

    def step(self, batch: int) -> None:
        """Train on one batch; bad ones explode the loss, or make gradients NaN (odd numbers)."""
        for one in self.optimizers:
            one.zero_grad()
        loss = self.model(DATA[batch % 64] * (1 + batch % 7)).square().mean()
        if batch >= BAD:
            loss = loss * (math.nan if batch % 2 else 1e4)
        loss.backward()
        self.session.observe(loss=loss, batch=batch)
        for one, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            one.step()
            scheduler.step()

    def everything(self) -> list[Any]:
        """Return all there is of the run, but for what says what happened."""
        plugins = self.session.state_dict()["plugins"]
        learned = {name: entry["state"] for name, entry in plugins.items() if name != "rollback"}
        learned["nonfinite-guard"].pop("total")
        buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
        schedules = [one.state_dict() for one in self.schedulers]
        pictures = [picture(one) for one in self.optimizers]
        for shown in pictures:
            del shown["random"]
        return [pictures, buffers, schedules, learned, self.session.updates]


def back() -> Rollback:
    return Rollback(4, calm=2, patience=3, max_skips=3, window=16, cooldown=2)


@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("device_mode", [False, True])
def test_a_rolled_back_run_is_one_that_never_saw_the_bad_batches(
    device_mode: bool, name: str, pair: bool
) -> None:
    chain = ("nonfinite-guard", "zclip:warmup_steps=5", "adagc:warmup_steps=3")
    options: dict[str, Any] = {"device_mode": device_mode, "pair": pair, "log_every": 1}
    run = Training(MAKERS[name], *chain, back(), **options)
    good, bad, later = range(22), [901, 903, 905], range(40, 50)
    for batch in (*good, *bad):
        run.step(batch)
    (event,) = [event for event in run.session.events if event.kind == "rollback"]
    assert (event.data["from_step"], event.data["to_step"]) == (25, 21)
    assert event.data["batches"] == [21, 901, 903, 905]
    twin = Training(MAKERS[name], *chain, **options)
    for batch in range(21):
        twin.step(batch)
    assert not difference(run.everything(), twin.everything())
    for batch in later:
        run.step(batch)
        twin.step(batch)
    assert not difference(run.everything(), twin.everything())
    assert (run.session.number, run.session.updates) == (35, 31)


def test_lbfgs_goes_back_through_its_closure() -> None:
    def make(
        *plugins: Plugin,
    ) -> tuple[nn.Parameter, Callable[[float], None], stablekit.Session]:
        param = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = optim.LBFGS([param], lr=0.3, max_iter=3)
        session = stablekit.attach(optimizer, *plugins)

        def step(gain: float) -> None:
            def closure() -> Tensor:
                scale = torch.tensor([1.0, 5.0])
                param.grad = gain * 2 * scale * (param.detach() - 1)
                return gain * (scale * (param.detach() - 1) ** 2).sum() + 1

            optimizer.step(closure)

        return param, step, session

    param, step, session = make(NonFiniteGuard(), Rollback(1, keep=1, calm=1, max_skips=2))
    twin, twin_step, _ = make()
    for gain in (1.0, 1.0, 1.0):
        step(gain)
        twin_step(gain)
    for gain in (math.nan, math.nan):
        step(gain)
    assert session.events[-1].kind == "rollback"
    for gain in (0.5, 1.0, 2.0):
        assert torch.equal(param, twin)
        step(gain)
        twin_step(gain)
    assert torch.equal(param, twin)


@pytest.mark.parametrize("options", [{}, {"device_mode": True, "fused": True, "log_every": 1}])
def test_a_loss_that_stays_high_is_a_divergence_and_a_spike_is_none(
    options: dict[str, Any],
) -> None:
    run = Stream(back(), **options)
    run.losses([*GOOD, 50.0, 50.0, 2.0, 60.0, 2.0])
    assert run.kinds() == []
    weight = run.weight
    run.losses([50.0, 60.0, 70.0])
    (event,) = run.events("rollback")
    assert "3 steps in a row were bad (a loss above" in event.message
    assert event.data["from_step"] == 48
    assert event.data["to_step"] <= 40
    assert run.weight == -event.data["to_update"] > weight


def test_a_loss_that_creeps_up_is_a_divergence_too() -> None:
    run = Stream(Rollback(10, calm=5, patience=10))
    run.losses(GOOD * 3)
    creeping = 0
    while not run.events("rollback"):
        creeping += 1
        run.step(1.0, 2.0 + 0.005 * creeping)
        assert creeping < 200
    assert creeping > 30


def test_a_fall_of_the_loss_and_ordinary_noise_are_none() -> None:
    noise = torch.Generator().manual_seed(0)
    run = Stream(Rollback(50))
    for step in range(600):
        loss = 2 + 8 * 0.98**step + 0.3 * float(torch.randn((), generator=noise))
        run.step(1.0, loss)
    assert run.kinds() == []


def test_nan_parameters_are_taken_back_at_once() -> None:
    run = Stream(back())
    run.losses(GOOD[:10])
    run.step(math.nan, 2.0)  # no guard: the weight is NaN now
    assert run.weight == -run.session.updates
    assert "not finite" in run.events("rollback")[0].data["reason"]


def test_a_broken_optimizer_state_is_found_before_it_is_kept() -> None:
    run = Stream(Rollback(1, calm=1, keep=3), make=optim.AdamW, lr=0.1)
    run.losses(GOOD[:5])
    run.optimizer.state[run.param]["exp_avg_sq"][1] = math.inf  # as from an overflow
    run.step(1.0, 2.0)
    assert run.kinds() == ["rollback"]
    assert bool(run.optimizer.state[run.param]["exp_avg_sq"].isfinite().all())


def test_too_many_skipped_steps_in_a_row_are_a_divergence() -> None:
    run = Stream("nonfinite-guard", back())
    run.losses(GOOD[:12])
    run.go([math.nan, math.nan, 1.0, math.nan, math.nan])
    assert "rollback" not in run.kinds()
    run.step(math.nan)
    assert run.kinds()[-1] == "rollback"
    assert run.events("rollback")[0].data["reason"] == "3 steps in a row were skipped"


@pytest.mark.parametrize("options", [{}, {"device_mode": True, "log_every": 1}])
def test_an_overflow_that_a_scaler_found_counts_for_nothing(options: dict[str, Any]) -> None:
    run = Stream(back(), make=optim.AdamW, lr=0.1, fused=True, **options)
    optimizer: Any = run.optimizer
    run.losses(GOOD[:8])
    for _ in range(6):
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
        run.step(math.inf, 2.0)
        del optimizer.grad_scale, optimizer.found_inf
    assert run.kinds() == []
    assert len(run.events("scaler-skip")) == 6


def test_events_and_calls_may_ask_for_it() -> None:
    class Alarm:
        name = "alarm"

        @stablekit.hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            if step.number == 8:
                step.emit("alarm")

    plugin = Rollback(2, calm=1, on="fire+alarm", cooldown=0)
    run = Stream(Alarm(), plugin)
    run.losses(GOOD[:8])
    assert run.events("rollback")[0].data["reason"] == "event 'alarm' of step 8"
    plugin.request("the validation loss has risen")
    run.step(1.0, 2.0)
    assert run.events("rollback")[1].data["reason"] == "the validation loss has risen"


def test_no_snapshot_is_taken_near_trouble_nor_returned_to() -> None:
    run = Stream(Rollback(1, keep=3, calm=3, patience=4, window=16, cooldown=0))
    run.losses([*GOOD[:16], 90.0, 2.0, 2.0])  # two good steps since trouble are too few
    run.losses([90.0] * 4)
    (event,) = run.events("rollback")
    assert (event.data["from_step"], event.data["to_step"]) == (23, 16)


def test_a_run_resumed_in_the_middle_of_trouble_has_a_snapshot_after_its_first_good_step() -> None:
    first = Stream("nonfinite-guard", Rollback(4, calm=10, patience=2, window=16))
    first.losses([*GOOD[:20], 90.0])
    plugin = Rollback(4, calm=10, patience=2, window=16)
    second = Stream("nonfinite-guard", plugin)
    second.param.data.copy_(first.param.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    held = []
    for loss in (2.0, 1.9, 90.0, 90.0):
        second.step(1.0, loss)
        held.append(second.session.metrics()["rollback/snapshots"])
    assert held == [1, 1, 1, 1]
    (event,) = second.events("rollback")
    assert (event.data["from_step"], event.data["to_step"]) == (25, 22)


@pytest.mark.parametrize("loss", [90.0, math.nan])
def test_the_first_snapshot_is_not_of_a_step_that_is_judged_bad(loss: float) -> None:
    first = Stream(Rollback(4, calm=10, patience=9, window=16))
    first.losses(GOOD[:20])
    second = Stream(Rollback(4, calm=10, patience=9, window=16))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step(1.0, loss)
    assert second.session.metrics()["rollback/snapshots"] == 0


def test_trouble_that_comes_back_leads_to_an_older_snapshot() -> None:
    run = Stream(Rollback(4, keep=3, calm=1, patience=3, window=16, cooldown=0))
    run.losses(GOOD[:30])
    for _ in range(3):
        run.losses([2.0, 90.0, 90.0, 90.0])
    assert [event.data["to_step"] for event in run.events("rollback")] == [29, 25, 21]


def test_within_the_cooldown_there_is_no_other_but_for_what_is_not_finite() -> None:
    run = Stream(Rollback(4, calm=1, patience=2, window=16, cooldown=10))
    run.losses([*GOOD[:20], 90.0, 90.0, 2.0, 90.0, 90.0, 90.0])
    assert len(run.events("rollback")) == 1
    run.step(math.nan, 2.0)
    assert len(run.events("rollback")) == 2
    assert math.isfinite(run.weight)


def test_after_too_many_returns_it_stops_with_the_snapshot_put_back() -> None:
    run = Stream(Rollback(4, calm=1, patience=2, window=16, cooldown=0, max_rollbacks=2))
    run.losses(GOOD[:20])
    for _ in range(2):
        run.losses([2.0, 90.0, 90.0])
    run.losses([2.0, 90.0])
    with pytest.raises(DivergenceError, match="after 2 rollbacks that did not get it past") as told:
        run.step(1.0, 90.0)
    (*_, event) = run.events("rollback")
    assert f"as after step {event.data['to_step']}" in str(told.value)
    assert run.weight == -event.data["to_update"] == -run.session.updates


def test_returns_that_get_the_run_further_are_not_limited() -> None:
    run = Stream(Rollback(2, calm=1, patience=2, window=16, cooldown=0, max_rollbacks=1))
    run.losses(GOOD[:20])
    for _ in range(5):
        run.losses([90.0, 90.0, *GOOD[:12]])
    assert len(run.events("rollback")) == 5


def test_without_a_snapshot_it_stops_and_says_so() -> None:
    run = Stream("nonfinite-guard", Rollback(max_skips=3))
    run.go([math.nan, math.nan])
    with pytest.raises(DivergenceError, match=r"step 3 .* before there was a snapshot"):
        run.step(math.nan)


def test_a_level_that_returning_does_not_lower_is_the_datas_and_accepted() -> None:
    run = Stream(Rollback(4, calm=2, patience=5, window=16, cooldown=0, max_rollbacks=1))
    run.losses([*GOOD[:20], *(5 * loss for loss in GOOD)])
    assert run.kinds() == ["rollback", "level-accepted"]
    run.losses([*(5 * loss for loss in GOOD), 200.0, 200.0, 200.0, 200.0, 200.0])
    assert run.kinds() == ["rollback", "level-accepted", "rollback"]


def test_the_callback_hears_of_the_batches_to_leave_out() -> None:
    told: list[Event] = []
    plugin = Rollback(2, calm=1, patience=2, window=16, on_rollback=told.append, name="back")
    run = Stream(plugin)
    for batch, loss in enumerate([*GOOD[:20], 90.0, 90.0]):
        run.step(1.0, loss, batch={"shard": 3, "rows": torch.tensor([batch, batch + 1])})
    (event,) = run.events("rollback")
    assert [one.as_dict() for one in told] == [event.as_dict()]
    assert event.plugin == "back"
    rows = [batch["rows"] for batch in event.data["batches"]]
    assert rows == [[k, k + 1] for k in range(event.data["to_step"], 22)]


@pytest.mark.parametrize(
    ("every", "batches"), [(2, "20, 21, 22"), (20, "2, 3, 4, 5, ..., 22"), (0, "")]
)
def test_the_message_says_from_where_to_where_and_over_which_batches(
    every: int, batches: str
) -> None:
    run = Stream(Rollback(every or 2, calm=1, patience=2, window=16))
    for batch, loss in enumerate([*GOOD[:20], 90.0, 90.0], 1):
        run.step(1.0, loss, batch=batch if every else None)
    (event,) = run.events("rollback")
    to = event.data["to_step"]
    over = f", over batches {batches}" if batches else ""
    begins = f"back from step 22 to the state after step {to} (update 22 to {to}{over}): 2 steps"
    assert event.message.startswith(begins)


def test_metrics_tell_of_snapshots_their_age_and_returns() -> None:
    run = Stream(Rollback(4, keep=2, calm=1, patience=2, window=16), log_every=1)
    rows = []
    for loss in [*GOOD[:10], 2.0, 90.0, 90.0]:
        run.step(1.0, loss)
        metrics = run.session.metrics()
        rows.append([int(metrics[f"rollback/{key}"]) for key in ("snapshots", "age", "rollbacks")])
    assert rows[:10] == [[min(1 + k // 4, 2), k % 4, 0] for k in range(10)]


def test_memory_is_that_of_the_snapshots_and_goes_with_the_session() -> None:
    plugin = Rollback(1, keep=2, calm=1)
    run = Stream(plugin, make=optim.SGD)
    run.losses(GOOD)
    assert plugin.nbytes == 2 * run.param.nbytes
    run.session.detach()
    assert plugin.nbytes == 0


def test_a_dry_run_says_when_it_would_have_returned() -> None:
    run = Stream(back(), dry_run=True)
    run.losses([*GOOD[:20], 90.0, 90.0, 90.0])
    assert [event.message[:25] for event in run.events("rollback")] == ["would have returned: 3 st"]
    assert run.weight == -23.0


def test_another_plugin_listed_later_does_not_learn_from_the_step_that_is_undone() -> None:
    spikes = SkipSpikes(window=8, warmup_steps=4, max_consecutive=1)
    run = Stream(Rollback(3, calm=1, patience=3, window=16, cooldown=0), spikes)
    run.losses([*GOOD[:16], 90.0, 90.0, 90.0])
    (event,) = run.events("rollback")
    assert event.data["to_step"] == 16
    assert spikes.state_dict()["loss"].tolist() == pytest.approx(GOOD[8:16])
    assert spikes.state_dict()["total"] == run.session.skipped == 1


def test_on_a_device_a_run_goes_back_at_most_log_every_steps_late_and_reads_nothing() -> None:
    run = Stream(
        Rollback(4, calm=1, patience=3, window=16), device_mode=True, fused=True, log_every=8
    )
    reads = {}
    for number, loss in enumerate([*GOOD, *([90.0] * 8)], 1):
        run.session.observe(loss=loss)
        run.param.grad = torch.tensor([1.0, 0.0])
        with HostReads() as seen:
            run.optimizer.step()
        reads[number] = seen.count
    assert all(count == 0 for number, count in reads.items() if number % 8)
    (event,) = run.events("rollback")
    assert (event.step, event.data["to_step"]) == (48, 40)
    assert run.weight == -40.0


@pytest.mark.parametrize("options", [{}, {"device_mode": True, "fused": True}])
@pytest.mark.parametrize("cut", [1, 5, 13, 20, 21, 23])
def test_what_it_knows_goes_on_after_a_checkpoint(cut: int, options: dict[str, Any]) -> None:
    def make() -> Stream:
        plugin = Rollback(1, keep=1, calm=1, patience=3, window=16)
        return Stream("nonfinite-guard", plugin, log_every=1, **options)

    losses = [*GOOD[:20], 90.0, math.nan, 2.0, 2.0, 90.0, 90.0]
    straight, first, second = make(), make(), make()
    straight.losses(losses)
    first.losses(losses[:cut])
    second.param.data.copy_(first.param.data)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.losses(losses[cut:])
    assert str(second.session.state_dict()) == str(straight.session.state_dict())
    second.step(1.0, 90.0)
    assert second.kinds()[-1] == "rollback"


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradscaler_the_loss_scale_goes_back_too(fused: bool) -> None:
    plugin, scaler = Rollback(1, keep=1, calm=1), torch.amp.GradScaler("cpu", 2.0, 2.0, 0.5, 3)
    param = nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([param], lr=0.1, fused=fused)
    session = stablekit.attach(optimizer, plugin)
    session.track(scaler=scaler)
    seen = []
    for step in range(9):
        plugin.every = 1 if step < 4 else 100
        if step == 6:
            plugin.request("test")
        optimizer.zero_grad()
        scaler.scale((param * param).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"], param.tolist()))
    # The snapshot is of step 3, taken within scaler.step, before scaler.update.
    assert seen[6:] == seen[3:6]


def test_a_loaded_checkpoint_is_not_left_for_a_snapshot_of_before() -> None:
    run = Stream(Rollback(1, keep=2, calm=1))
    run.losses(GOOD[:5])
    saved, weight = run.optimizer.state_dict(), run.param.detach().clone()
    run.losses(GOOD[:10])
    run.optimizer.load_state_dict(saved)
    run.param.data.copy_(weight)
    run.losses(GOOD[:3])
    run.step(math.nan, 2.0)
    (event,) = run.events("rollback")
    assert event.data["to_step"] == 8
    assert run.weight == -8.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"keep": 0}, "keep must be"),
        ({"calm": 0}, "calm must be"),
        ({"patience": 0}, "patience must be"),
        ({"max_skips": 0}, "max_skips must be"),
        ({"sigma": -1}, "sigma must be"),
        ({"window": 1}, "window must be"),
        ({"cooldown": -1}, "cooldown must be"),
        ({"max_rollbacks": -1}, "max_rollbacks must be"),
        ({"on": ("",)}, "on must be"),
        ({"on_rollback": 3}, "on_rollback must be callable"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Rollback(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"losses": torch.tensor([math.nan])},
        {"best": math.nan},
        {"best_std": -1.0},
        {"has_best": 1},
        {"bad": -1},
        {"asked": None},
        {"was_good": "yes"},
        {"in_a_row": 0.5},
    ],
)
def test_a_bad_state_is_refused(change: dict[str, Any]) -> None:
    run = Stream(Rollback())
    run.losses(GOOD)
    before = run.session.state_dict()
    entry = before["plugins"]["rollback"]
    bad = {**entry, "state": {**entry["state"], **change}}
    with pytest.raises(ValueError, match=f"rollback.*{next(iter(change))}"):
        run.session.load_state_dict({**before, "plugins": {"rollback": bad}})
    assert str(run.session.state_dict()) == str(before)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("factory", [Rollback, Rollback.example], ids=["usual", "example"])
def test_the_contract_is_kept(check: Callable[[Factory], None], factory: Factory) -> None:
    check(factory)
