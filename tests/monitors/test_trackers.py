"""A Tracker talks to anything with a method log, and alerts where there is one for that."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest

from stablekit.testing import CHECKS, Factory, NanGuard, TinyRun
from stablekit_monitors import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Wandb:
    """Takes what a wandb run takes."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.alerts: list[tuple[str, str]] = []

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        self.rows.append((step, data))

    def alert(
        self, title: str, text: str, level: str | None = None, wait_duration: int = 60
    ) -> None:
        self.alerts.append((title, text))


class Accelerator:
    """Takes what an Accelerator takes, which knows no alerts."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log(
        self,
        values: dict[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows.append((step, values))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None]) -> None:
    check(Tracker.example)


@pytest.mark.parametrize("make", [Wandb, Accelerator])
def test_metrics_come_at_every_log_point(make: type[Wandb | Accelerator]) -> None:
    tracker = make()
    run = TinyRun(NanGuard(), "zclip", Tracker(tracker), nan_at=(0,), log_every=2).go(4)
    assert run.session is not None
    assert [step for step, _ in tracker.rows] == [2, 4]
    assert tracker.rows[-1][1] == run.session.metrics()
    assert type(tracker.rows[-1][1]) is dict


def test_events_become_alerts() -> None:
    tracker = Wandb()
    TinyRun(NanGuard(), Tracker(tracker), nan_at=(1,)).go(3)
    titles = [title for title, _ in tracker.alerts]
    assert titles == ["stablekit: nonfinite", "stablekit: skip"]
    assert tracker.alerts[0][1].startswith("step 2: gradient norm is nan")
    assert tracker.alerts[0][1].endswith("(0.weight)")
    assert tracker.alerts[1][1] == "step 2: nan-guard: the gradients are not finite"


def test_alerts_can_be_turned_off() -> None:
    tracker = Wandb()
    TinyRun(NanGuard(), Tracker(tracker, alerts=False), nan_at=(1,)).go(3)
    assert tracker.alerts == []
    assert len(tracker.rows) == 3


def test_a_module_with_a_function_log_will_do() -> None:
    rows: list[int] = []
    module = types.ModuleType("trackio")
    module.log = lambda metrics, step=None: rows.append(step)  # type: ignore[attr-defined]
    TinyRun(Tracker(module)).go(2)
    assert rows == [1, 2]


@pytest.mark.parametrize("run", [None, 3, "wandb", object()])
def test_what_cannot_log_is_refused(run: object) -> None:
    with pytest.raises(TypeError, match="run must be an object with a method log"):
        Tracker(run)
    with pytest.raises(TypeError, match="alerts must be True or False"):
        Tracker(Wandb(), alerts=1)  # type: ignore[arg-type]  # that is the mistake
