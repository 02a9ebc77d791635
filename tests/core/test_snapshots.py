"""A snapshot puts a run back bit for bit, in place, and the run goes on as if it had been there."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import stablekit
from stablekit import hookimpl
from stablekit.errors import StateError, StateWarning
from stablekit.snapshots import Snapshot, is_finite
from tests.core.oracles import X, Y, backward, copies, difference, equal, picture, small_model
from tests.core.test_torch_optimizers import CASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stablekit import Step


def tensors_of(optimizer: optim.Optimizer) -> list[Tensor]:
    """Return the parameters and state tensors themselves."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return params + states


def train(optimizer: optim.Optimizer, model: nn.Module, steps: Iterable[int]) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def assert_same(left: Any, right: Any) -> None:
    """Compare pictures; where in a dictionary an entry stands does not matter."""
    assert not difference(_sorted(left), _sorted(right))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _sorted(value[key]) for key in sorted(value, key=str)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CASES)
def test_run_goes_back_in_place_and_on_as_a_copy_made_by_hand(name: str) -> None:
    model = small_model()
    optimizer = CASES[name](model.parameters())
    session = stablekit.attach(optimizer)
    train(optimizer, model, range(3))
    snapshot, before = Snapshot.take(session), picture(optimizer)
    twin, copied = copy.deepcopy((model, optimizer))  # which drops the session
    tensors = tensors_of(optimizer)
    train(optimizer, model, range(20, 24))
    snapshot.restore()
    assert_same(picture(optimizer), before)
    assert all(a is b for a, b in zip(tensors_of(optimizer), tensors, strict=True))
    assert (session.number, session.updates) == (7, 3)
    train(optimizer, model, range(5, 9))
    train(copied, twin, range(5, 9))
    assert_same(picture(optimizer)["params"], picture(copied)["params"])
    states = [[optimizer.state[p] for p in model.parameters()]]
    assert_same(states, [[copied.state[p] for p in twin.parameters()]])


@pytest.mark.parametrize("name", ["AdamW-foreach", "AdamW-fused", "SGD-momentum", "NAdam-loop"])
def test_state_made_after_the_snapshot_disappears(name: str) -> None:
    model = small_model()
    optimizer = CASES[name](model.parameters())
    session = stablekit.attach(optimizer, "zclip")
    before, plugins = picture(optimizer), session.state_dict()["plugins"]
    snapshot = Snapshot.take(session)
    train(optimizer, model, range(4))
    assert optimizer.state
    snapshot.restore()
    assert len(optimizer.state) == 0
    assert_same(picture(optimizer), before)
    assert session.state_dict()["plugins"] == plugins


def test_a_snapshot_can_be_restored_again_and_again() -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    session = stablekit.attach(optimizer)
    train(optimizer, model, range(2))
    snapshot, before = Snapshot.take(session), picture(optimizer)
    for _ in range(3):
        train(optimizer, model, range(3))
        optimizer.state.clear()  # nothing to write into
        snapshot.restore()
        assert_same(picture(optimizer), before)


def _closure_run(model: nn.Module, optimizer: optim.Optimizer, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X.roll(step, 0)), Y)
            loss.backward()
            return loss

        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]  # a tensor, as torch takes it
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_goes_back_with_its_whole_history(line_search: str | None) -> None:
    model = small_model()
    optimizer = optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=3, history_size=4, line_search_fn=line_search
    )
    session = stablekit.attach(optimizer, "nonfinite-guard")
    _closure_run(model, optimizer, range(3))
    snapshot, before = Snapshot.take(session), picture(optimizer)
    _closure_run(model, optimizer, range(10, 14))
    snapshot.restore()
    assert_same(picture(optimizer), before)
    losses = _closure_run(model, optimizer, range(4))
    twin = small_model()
    plain = optim.LBFGS(
        twin.parameters(), lr=0.5, max_iter=3, history_size=4, line_search_fn=line_search
    )
    assert _closure_run(twin, plain, [0, 1, 2, 0, 1, 2, 3])[3:] == losses
    assert equal(copies(model.parameters()), copies(twin.parameters()))


def test_several_optimizers_go_back_together() -> None:
    model = small_model()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    pair = [optim.Muon(matrices, lr=0.01), optim.AdamW(others, lr=0.01)]
    session = stablekit.attach(pair, "zclip")

    def go(steps: Iterable[int]) -> None:
        for step in steps:
            backward(model, step)
            for one in pair:
                one.step()

    go(range(3))
    snapshot, before = Snapshot.take(session), [picture(one) for one in pair]
    go(range(30, 33))
    snapshot.restore()
    assert_same([picture(one) for one in pair], before)


def test_an_optimizer_inside_another_goes_back_too() -> None:
    class Outer(optim.Optimizer):
        def __init__(self, inner: optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner
            self.calls = 0

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.calls += 1
            self.inner.step()

    model = small_model()
    outer = Outer(optim.Adam(model.parameters(), lr=0.01))
    session = stablekit.attach(outer)
    train(outer, model, range(2))
    snapshot, before = Snapshot.take(session), picture(outer)
    train(outer, model, range(3))
    snapshot.restore()
    assert outer.calls == 2
    assert_same(picture(outer), before)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x)))
        return result


def test_buffers_of_the_model_go_back_in_place() -> None:
    model = _Normed()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    session = stablekit.attach(optimizer, model=model)
    train(optimizer, model, range(2))
    snapshot, before = Snapshot.take(session), copies(model.buffers())
    objects = list(model.buffers())
    train(optimizer, model, range(2))
    assert not equal(copies(model.buffers()), before)
    snapshot.restore()
    assert equal(copies(model.buffers()), before)
    assert all(a is b for a, b in zip(model.buffers(), objects, strict=True))


SCHEDULERS: dict[str, Any] = {
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


class _AtStep:
    """Calls something in the middle of a run, when a step is over."""

    name = "at-step"

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        if step.number in self.calls:
            step.session.when_idle(self.calls[step.number])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_tracked_scheduler_goes_on_from_where_the_run_went_back_to(name: str) -> None:
    def run(batches: list[int], back: tuple[int, int] | None) -> tuple[list[float], list[Tensor]]:
        model, at, kept = small_model(), _AtStep(), []
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scheduler = SCHEDULERS[name](optimizer)
        session = stablekit.attach(optimizer, at)
        session.track(scheduler=scheduler)
        if back is not None:
            at.calls = {
                back[0]: lambda: kept.append(Snapshot.take(session)),
                back[1]: lambda: kept[0].restore(),
            }
        rates = []
        for batch in batches:
            rates.append(optimizer.param_groups[0]["lr"])
            backward(model, batch)
            optimizer.step()
            scheduler.step()
        return rates, copies(model.parameters())

    # Snapshot within step 4, back within step 7: steps 5 to 7 leave no trace.
    rates, weights = run([0, 1, 2, 3, 90, 91, 92, 4, 5, 6], (4, 7))
    expected_rates, expected = run([0, 1, 2, 3, 4, 5, 6], None)
    assert equal(weights, expected)
    assert rates[:4] + rates[7:] == expected_rates


def test_an_untracked_scheduler_keeps_its_rate_and_is_warned_about() -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    before = copies(model.parameters())
    train(optimizer, model, range(1))
    scheduler.step()
    with pytest.warns(StateWarning, match="session.track"):
        snapshot.restore()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert equal(copies(model.parameters()), before)


def test_tracked_objects_are_checked_replaced_and_kept_apart() -> None:
    model = small_model()
    session = stablekit.attach(optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="loader is a list, which has no state_dict"):
        session.track(loader=[])
    average, other = nn.Linear(2, 2), nn.Linear(2, 2)
    session.track(average=other)
    session.track(average=average)
    assert session.tracked == {"average": average}
    snapshot = Snapshot.take(session)
    weight = average.weight.detach().clone()
    nn.init.zeros_(average.weight)
    snapshot.restore()
    assert torch.equal(average.weight, weight)
    nn.init.zeros_(average.weight)  # must not reach into the snapshot
    snapshot.restore()
    assert torch.equal(average.weight, weight)


def test_tensors_that_are_one_stay_one_and_those_that_are_two_stay_two() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.1)
    shared = torch.arange(3.0)
    optimizer.state[param] = {"a": shared, "b": shared, "c": [torch.ones(2), param], "n": {"d": 1}}
    optimizer.state[param]["last"] = deque([torch.ones(1), torch.zeros(1)], maxlen=2)
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    one = torch.zeros(3)
    optimizer.state[param] = {"a": one, "b": torch.zeros(3), "c": [torch.zeros(2)], "later": 1}
    snapshot.restore()
    state = optimizer.state[param]
    assert state["a"] is state["b"] is one
    assert state["a"].tolist() == [0.0, 1.0, 2.0]
    assert state["c"][1] is param
    assert state["n"] == {"d": 1}
    assert (list(map(float, state["last"])), state["last"].maxlen) == ([1.0, 0.0], 2)
    assert "later" not in state
    optimizer.state[param] = {"a": one, "b": one, "c": one, "n": {}}
    one.zero_()
    Snapshot.take(session, reuse=snapshot).restore()
    assert state["a"] is one


def test_group_entries_and_counters_go_back_and_what_others_set_stays() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer: Any = optim.SGD([param], lr=0.1)
    optimizer.count, optimizer.table = 3, {"x": torch.ones(1)}
    optimizer.param_groups[0]["k"] = 1
    optimizer.state["all"] = {"steps": 5}
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    optimizer.count, optimizer.late, optimizer.grad_scale = 9, 1, torch.ones(())
    optimizer.table["x"].zero_()
    optimizer.param_groups[0].update(k=2, late=1)
    optimizer.state["all"]["steps"] = 8
    optimizer.state["late"] = {}
    snapshot.restore()
    assert (optimizer.count, optimizer.table["x"].item()) == (3, 1.0)
    assert not hasattr(optimizer, "late")
    assert hasattr(optimizer, "grad_scale")  # GradScaler's, which deletes it itself
    assert optimizer.param_groups[0]["k"] == 1
    assert "late" not in optimizer.param_groups[0]
    assert dict(optimizer.state) == {"all": {"steps": 5}}


def test_a_group_added_since_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([first], lr=0.1)
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    optimizer.add_param_group({"params": [second]})
    for param in (first, second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = second.detach().clone()
    snapshot.restore()
    assert first.tolist() == [1.0, 1.0]
    assert torch.equal(second, moved)
    assert list(optimizer.state) == [second]


def test_other_parameters_are_refused_before_anything_changes() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = optim.SGD([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.1)
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    params[0].data.zero_()
    optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(4))]
    with pytest.raises(StateError, match="group 1 of SGD holds other parameters"):
        snapshot.restore()
    del optimizer.param_groups[1]
    with pytest.raises(StateError, match="2 parameter groups, the SGD has 1"):
        snapshot.restore()
    assert params[0].tolist() == [0.0, 0.0]


def test_parameters_swapped_since_are_written_where_they_are_now() -> None:
    # As FSDP2 does: other objects, same shapes.
    optimizer = optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1)
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    swapped = nn.Parameter(torch.zeros(2))
    optimizer.param_groups[0]["params"] = [swapped]
    snapshot.restore()
    assert swapped.tolist() == [1.0, 1.0]


def test_memory_is_counted_and_used_again() -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    session = stablekit.attach(optimizer)
    train(optimizer, model, range(2))
    size = sum(param.nbytes for param in model.parameters())
    first = Snapshot.take(session)
    steps = 4 * len(list(model.parameters()))
    assert first.nbytes == 3 * size + steps
    places = {kept.data.data_ptr() for kept in first._kept}
    train(optimizer, model, range(3))
    before = picture(optimizer)
    second = Snapshot.take(session, reuse=first)
    assert {kept.data.data_ptr() for kept in second._kept} == places
    with pytest.raises(RuntimeError, match="written over"):
        first.restore()
    train(optimizer, model, range(3))
    second.restore()
    assert_same(picture(optimizer), before)


class _Logger:
    """Counts steps for good, however often the run goes back."""

    name = "logger"

    def __init__(self) -> None:
        self.lines = 0
        self.went_back_to = -1

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        self.lines += 1

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lines = state["lines"]

    def go_back(self, state: Mapping[str, Any]) -> None:
        self.went_back_to = state["lines"]


def test_a_plugin_may_say_what_going_back_means_to_it() -> None:
    model, logger = small_model(), _Logger()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, logger)
    train(optimizer, model, range(2))
    snapshot = Snapshot.take(session)
    train(optimizer, model, range(3))
    snapshot.restore()
    assert (logger.lines, logger.went_back_to) == (5, 2)


def test_history_stays_and_updates_go_back() -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard", "global-norm:max_norm=0.001")
    train(optimizer, model, range(2))
    snapshot = Snapshot.take(session)
    train(optimizer, model, range(2))
    first = next(iter(model.parameters()))
    assert first.grad is not None
    first.grad[0] = torch.nan
    optimizer.step()
    snapshot.restore()
    saved = session.state_dict()
    assert (saved["number"], saved["updates"], saved["skipped"]) == (5, 2, 1)
    assert saved["clipped"] == {"global-norm": 4}
    assert [event.kind for event in session.events] == ["nonfinite", "skip"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_in_parameters_and_moments(
    dtype: torch.dtype, value: float
) -> None:
    param, empty = nn.Parameter(torch.ones(5, dtype=dtype)), nn.Parameter(torch.ones(0))
    optimizer = optim.AdamW([param, empty], lr=0.1)
    session = stablekit.attach(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert is_finite(session)
    for tensor in (param.data, optimizer.state[param]["exp_avg_sq"]):
        kept = tensor[3].clone()
        tensor[3] = value
        assert not is_finite(session)
        tensor[3] = kept
    assert is_finite(session)


def test_call_when_idle_comes_after_every_plugin_and_before_metrics() -> None:
    order: list[str] = []

    class First:
        name = "first"

        @hookimpl
        def on_step_end(self, step: Step) -> None:
            step.session.when_idle(lambda: order.append("idle"))

    class Second:
        name = "second"

        @hookimpl
        def on_step_end(self, step: Step) -> None:
            order.append("second")

        @hookimpl
        def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
            order.append("metrics")

    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, First(), Second())
    train(optimizer, model, range(2))
    assert order == ["second", "idle", "metrics"] * 2


def test_a_snapshot_without_parameters_or_state_is_no_special_case() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["params"] = []
    session = stablekit.attach(optimizer)
    snapshot = Snapshot.take(session)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.restore()
    assert (snapshot.nbytes, is_finite(session)) == (0, True)
