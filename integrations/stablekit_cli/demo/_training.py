"""The training loop of the demo: the same for every arm, with one injected NaN."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from stablekit_cli.demo._protection import Stopped, protect

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from stablekit_cli.demo._arms import Arm
    from stablekit_cli.demo._protection import Incident, Reading
    from stablekit_cli.demo._workload import Workload

__all__ = ["Plan", "Record", "Run", "train"]

INJECTED_AT = 0.85


@dataclass(frozen=True)
class Plan:
    """What all arms have in common."""

    steps: int
    seed: int

    @property
    def injected_step(self) -> int:
        """The step whose gradient gets the injected NaN, counted from 1."""
        return max(1, round(INJECTED_AT * self.steps))


@dataclass(frozen=True)
class Record:
    """One step."""

    step: int
    loss: float
    reading: Reading
    milliseconds: float


@dataclass
class Run:
    """One arm from start to end."""

    arm: Arm
    records: list[Record] = field(default_factory=list)
    held_out_start: float = math.nan
    """Held-out loss of the untrained model."""
    held_out_before: float = math.nan
    """Held-out loss right before the injected step, or at death where that came first."""
    held_out_end: float = math.nan
    died_at: int | None = None
    cause: str = ""

    @property
    def diverged(self) -> bool:
        """Whether, before the injected NaN, the model was worse than an untrained one."""
        return not self.held_out_before < self.held_out_start

    @property
    def skipped_steps(self) -> list[int]:
        """Numbers of the steps that the arm skipped."""
        return [record.step for record in self.records if record.reading.skipped]

    @property
    def incidents(self) -> list[tuple[int, Incident]]:
        """Everything the arm reported, with the number of the step."""
        return [(r.step, incident) for r in self.records for incident in r.reading.incidents]


def train(
    workload: Workload,
    arm: Arm,
    plan: Plan,
    on_step: Callable[[Record], None] | None = None,
    folder: Path | None = None,
) -> Run:
    """Train one arm until it ends or dies; nothing but the arm differs from call to call.

    Args:
        workload: what is trained.
        arm: how it is protected.
        plan: how long, and with which seed.
        on_step: told of every step.
        folder: where an arm with stablekit records its run.
    """
    loop = _Loop(workload, arm, plan, folder)
    try:
        return _train(loop, Run(arm, held_out_start=loop.held_out()), plan, on_step)
    finally:
        loop.close()


def _train(loop: _Loop, run: Run, plan: Plan, on_step: Callable[[Record], None] | None) -> Run:
    for number in range(1, plan.steps + 1):
        if number == plan.injected_step:
            run.held_out_before = loop.held_out()
        _advance(loop, run, number)
        if on_step is not None and run.records:
            on_step(run.records[-1])
        if run.died_at is not None:
            break
    run.held_out_end = loop.held_out()
    if run.died_at is not None and run.died_at < plan.injected_step:
        run.held_out_before = run.held_out_end
    return run


def _advance(loop: _Loop, run: Run, number: int) -> None:
    """Make one step and note whether the arm survived it."""
    try:
        record = loop.step(number)
    except Stopped as stopped:
        run.died_at, run.cause = number, str(stopped)
        return
    run.records.append(record)
    if not math.isfinite(record.loss) and not record.reading.skipped:
        run.died_at, run.cause = number, f"training loss is {record.loss}"


class _Loop:
    """A model, its optimizer under an arm, and the order of the data."""

    def __init__(self, workload: Workload, arm: Arm, plan: Plan, folder: Path | None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self._model = workload.model()
        self._workload = workload
        self._plan = plan
        self._optimizer = workload.optimizer(self._model)
        self._protection = protect(arm, self._model, self._optimizer, folder)
        self._order = torch.Generator().manual_seed(plan.seed)

    def close(self) -> None:
        self._protection.close()

    def held_out(self) -> float:
        return self._workload.held_out(self._model)

    def step(self, number: int) -> Record:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._workload.loss(self._model, self._order)
        loss.backward()
        if number == self._plan.injected_step:
            _inject_nan(self._model, self._workload.facts.injected_tensor)
        self._protection.step(loss)
        elapsed = time.perf_counter() - started
        return Record(number, loss.item(), self._protection.reading(), 1e3 * elapsed)


def _inject_nan(model: nn.Module, name: str) -> None:
    gradient = model.get_parameter(name).grad
    if gradient is None:
        raise RuntimeError(f"cannot inject a NaN: {name} has no gradient")
    gradient.view(-1)[0] = math.nan
