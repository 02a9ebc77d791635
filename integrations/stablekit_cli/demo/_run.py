"""The demo from the arguments to the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from stablekit_cli.demo._arms import ArmError, parse_arms
from stablekit_cli.demo._chart import draw
from stablekit_cli.demo._checks import failures
from stablekit_cli.demo._corpus import CorpusError
from stablekit_cli.demo._protection import check, plugin_names
from stablekit_cli.demo._reports import fresh_log, log_of, write_reports
from stablekit_cli.demo._results import write_results
from stablekit_cli.demo._table import notes, table
from stablekit_cli.demo._tensorboard import write_tensorboard
from stablekit_cli.demo._training import Plan, train

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from stablekit_cli.demo._arms import Arm
    from stablekit_cli.demo._training import Record, Run
    from stablekit_cli.demo._workload import Facts, Workload

__all__ = ["UsageError", "load_workload", "run_demo"]


class UsageError(ValueError):
    """The demo cannot start with these arguments; the message says why."""


def run_demo(
    workload: str, steps: int | None, seed: int, arms: str, guard: bool, out: Path, console: Console
) -> bool:
    """Train all arms, print and write the result; return whether every check passed.

    Raises:
        UsageError: An unknown arm or workload, or data that this machine does not have.
    """
    try:
        parsed = parse_arms(arms, plugin_names(), guard=guard)
        job = load_workload(workload)
        chosen = [arm.fitted(job.facts.keywords) for arm in parsed]
        for arm in chosen:
            check(arm, job)
    except (ArmError, CorpusError) as error:
        raise UsageError(str(error)) from error
    plan = Plan(job.facts.steps if steps is None else steps, seed)
    _announce(console, job.facts, plan, chosen)
    runs = _train_all(job, chosen, plan, out, console)
    _write(out, runs, plan, job.facts)
    told = write_reports(out, runs, job.facts.name)
    console.print(table(runs, plan, job.facts))
    for note in notes(runs, plan, job.facts):
        console.print(note, soft_wrap=True)
    console.print(f"Written: {out}/demo.png, {out}/results.json", soft_wrap=True)
    console.print(f"Curves: tensorboard --logdir {out / 'tensorboard'}", soft_wrap=True)
    if told is not None:
        console.print(
            f"Report: {out}/report.html ({told.label}; links to the others)", soft_wrap=True
        )
        log = log_of(out, told)
        console.print(f"What if: stablekit replay {log} --plugin adagc", soft_wrap=True)
    return not any(failures(run, plan, job.facts) for run in runs)


def load_workload(name: str) -> Workload:
    """Build a workload by name; only the chosen one is imported."""
    if name in ("shards", "shards-adamw"):
        from stablekit_cli.demo._shards import Shards

        return Shards(adam=name == "shards-adamw")
    if name == "rnn":
        from stablekit_cli.demo._rnn import Rnn

        return Rnn()
    if name == "digits":
        from stablekit_cli.demo._digits import Digits

        return Digits()
    raise UsageError(f"unknown workload {name!r}; known: shards, shards-adamw, rnn, digits")


def _announce(console: Console, facts: Facts, plan: Plan, arms: list[Arm]) -> None:
    console.print(f"[bold]{facts.name}[/bold]: {facts.title}", soft_wrap=True, highlight=False)
    console.print(f"Data: {facts.data}", soft_wrap=True, highlight=False)
    console.print(
        f"Injected on purpose: one NaN into the gradient of {facts.injected_tensor} at step "
        f"{plan.injected_step} of {plan.steps}, in every arm. Seed {plan.seed}, "
        f"{torch.get_num_threads()} thread(s).",
        soft_wrap=True,
        highlight=False,
    )
    for arm in arms:
        console.print(f"  {arm.label}: {arm.describe()}", soft_wrap=True, highlight=False)
    if any(arm.protected for arm in arms):
        console.print(
            "  Every arm with stablekit is watched by spike-monitor and recorded.",
            soft_wrap=True,
            highlight=False,
        )


def _train_all(
    job: Workload, arms: list[Arm], plan: Plan, out: Path, console: Console
) -> list[Run]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    width = max(len(arm.label) for arm in arms)
    with Progress(*columns, console=console) as progress:
        return [_train(job, arm, plan, fresh_log(out, arm), progress, width) for arm in arms]


def _train(
    job: Workload, arm: Arm, plan: Plan, folder: Path, progress: Progress, width: int
) -> Run:
    task = progress.add_task(arm.label.ljust(width), total=plan.steps, status="")

    def show(record: Record) -> None:
        progress.update(task, completed=record.step, status=f"loss {record.loss:.3g}")

    run = train(job, arm, plan, show, folder)
    progress.update(task, status=_status(run, plan))
    progress.stop_task(task)
    return run


def _status(run: Run, plan: Plan) -> str:
    if run.died_at is None:
        return f"loss {run.records[-1].loss:.3g}, finished"
    after = " (injected NaN)" if run.died_at >= plan.injected_step else ""
    return f"died at step {run.died_at}{after}"


def _write(out: Path, runs: list[Run], plan: Plan, facts: Facts) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_tensorboard(out / "tensorboard", run)
    write_results(out / "results.json", runs, plan, facts)
    draw(out / "demo.png", runs, plan, facts)
