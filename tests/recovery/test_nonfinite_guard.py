"""NonFiniteGuard skips bad steps, names the tensors, and gives up after too many in a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import stablekit
from stablekit.errors import NonFiniteError
from stablekit_recovery import NonFiniteGuard

if TYPE_CHECKING:
    from collections.abc import Callable

BAD = {"nan": math.nan, "inf": math.inf, "overflow": 3e38}

modes = pytest.mark.parametrize(
    ("device_mode", "make"),
    [
        (False, torch.optim.AdamW),
        (False, torch.optim.SGD),
        (True, lambda params: torch.optim.AdamW(params, fused=True)),
        (True, torch.optim.AdamW),
    ],
    ids=["host", "host sgd", "device fused", "device"],
)


class Run:
    """Two parameters, a guard, and steps with good or bad gradients."""

    def __init__(
        self,
        make: Callable[[Any], torch.optim.Optimizer],
        device_mode: bool,
        *others: str,
        max_consecutive: int = 3,
        log_every: int = 1,
    ) -> None:
        self.params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        self.optimizer = make([("weight", self.params[0]), ("bias", self.params[1])])
        self.guard = NonFiniteGuard(max_consecutive=max_consecutive)
        self.session = stablekit.attach(
            self.optimizer, self.guard, *others, device_mode=device_mode, log_every=log_every
        )

    def step(self, value: float = 1.0, *, which: int = 1) -> None:
        for param in self.params:
            param.grad = torch.ones_like(param)
        self.params[which].grad = torch.full_like(self.params[which], value)
        self.optimizer.step()

    def skips(self) -> list[stablekit.Event]:
        self.session.metrics()
        return [event for event in self.session.events if event.kind == "skip"]

    def picture(self) -> list[torch.Tensor]:
        states = [v for s in self.optimizer.state.values() for v in s.values() if v is not None]
        return [t.detach().clone() for t in (*self.params, *states)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@modes
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_step_moves_nothing_and_a_good_one_does(
    bad: str, device_mode: bool, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    run = Run(make, device_mode)
    run.step()
    before = run.picture()
    run.step(BAD[bad])
    assert same(run.picture(), before)
    assert run.params[1].grad is not None
    assert run.params[1].grad[0].item() == pytest.approx(BAD[bad], nan_ok=True)
    run.step()
    assert not same(run.picture()[:2], before[:2])
    assert (run.session.number, run.session.skipped) == (3, 1)


@modes
@pytest.mark.parametrize(("which", "name"), [(0, "weight"), (1, "bias")])
def test_the_event_names_the_tensor_and_the_step(
    which: int,
    name: str,
    device_mode: bool,
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    run = Run(make, device_mode)
    run.step()
    run.step(math.nan, which=which)
    (event,) = run.skips()
    assert (event.step, event.plugin, event.tensors) == (2, "nonfinite-guard", (name,))
    assert event.message == "the gradients are not finite"
    kinds = [e.data["kind"] for e in run.session.events if e.kind == "nonfinite"]
    assert kinds == ["nan"]


@modes
def test_skips_are_counted(device_mode: bool, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    run = Run(make, device_mode)
    for value in (1.0, math.nan, math.inf, 1.0, math.nan):
        run.step(value)
    metrics = run.session.metrics()
    assert metrics["steps_skipped"] == 3
    assert metrics["nonfinite-guard/skipped"] == 3
    assert run.guard.state_dict() == {"in_a_row": 1, "total": 3}
    assert run.session.updates == 2


@modes
def test_the_first_bad_step_after_the_allowed_ones_raises(
    device_mode: bool, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    run = Run(make, device_mode, max_consecutive=3)
    run.step()
    before = run.picture()
    for _ in range(3):
        run.step(math.nan)
    with pytest.raises(NonFiniteError, match="4 steps in a row, up to step 5; 3 may be skipped"):
        run.step(math.nan)
    assert same(run.picture(), before)


@modes
def test_a_good_step_starts_the_count_again(
    device_mode: bool, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    run = Run(make, device_mode, max_consecutive=2)
    for value in (math.nan, math.inf, 1.0, math.nan, math.nan, 1.0, math.inf):
        run.step(value)
    assert len(run.skips()) == 5


def test_the_count_goes_on_after_a_checkpoint() -> None:
    run = Run(torch.optim.AdamW, False, max_consecutive=3)
    run.step()
    for _ in range(2):
        run.step(math.nan)
    state = run.optimizer.state_dict()
    resumed = Run(torch.optim.AdamW, False, max_consecutive=3)
    resumed.optimizer.load_state_dict(state)
    resumed.step(math.nan)
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        resumed.step(math.nan)


def test_training_goes_on_after_the_error_if_gradients_are_good_again() -> None:
    run = Run(torch.optim.AdamW, False, max_consecutive=1)
    run.step(math.nan)
    with pytest.raises(NonFiniteError):
        run.step(math.nan)
    run.step()
    run.step(math.nan)
    assert run.guard.state_dict()["in_a_row"] == 1


def test_the_error_comes_with_the_next_host_read_in_device_mode() -> None:
    fused = Run(
        lambda params: torch.optim.AdamW(params, fused=True), True, max_consecutive=2, log_every=10
    )
    fused.step()
    before = fused.picture()
    for _ in range(8):
        fused.step(math.nan)
    with pytest.raises(NonFiniteError):
        fused.step(math.nan)
    assert same(fused.picture(), before)


@pytest.mark.parametrize("device_mode", [False, True])
def test_no_statistic_of_a_later_plugin_moves_in_a_skipped_step(device_mode: bool) -> None:
    names = ("zclip", "autoclip", "adagc", "quantile-clip")
    run = Run(lambda params: torch.optim.AdamW(params, fused=True), device_mode, *names)
    for _ in range(3):
        run.step()
    before = [run.session.state_dict()["plugins"][name] for name in names]
    for value in BAD.values():
        run.step(value)
    after = [run.session.state_dict()["plugins"][name] for name in names]
    assert str(before) == str(after)


def test_without_gradients_there_is_nothing_to_skip() -> None:
    run = Run(torch.optim.AdamW, False)
    for param in run.params:
        param.grad = None
    run.optimizer.step()
    assert run.session.skipped == 0


def test_a_restricted_guard_looks_at_its_own_tensors() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([("a", params[0]), ("b", params[1])], lr=0.1)
    session = stablekit.attach(optimizer, stablekit.only("nonfinite-guard", include="a"))
    for param, value in zip(params, (1.0, math.nan), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    assert session.skipped == 0
    assert bool(params[0].isfinite().all())


@pytest.mark.parametrize("field", ["in_a_row", "total"])
@pytest.mark.parametrize("value", [-1, 1.5, None, "2", True, math.nan])
def test_a_bad_count_is_refused_by_name(field: str, value: object) -> None:
    guard = NonFiniteGuard()
    with pytest.raises((TypeError, ValueError), match=field):
        guard.load_state_dict({"in_a_row": 1, "total": 2, field: value})
    assert guard.state_dict() == {"in_a_row": 0, "total": 0}
