"""``stablekit replay`` from the arguments to what is printed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stablekit_cli._runs import NoRunError, name_of, open_run
from stablekit_cli.replay._chains import parse_chains
from stablekit_cli.replay._chart import draw
from stablekit_cli.replay._play import play
from stablekit_cli.replay._score import score
from stablekit_cli.replay._spikes import spikes_of
from stablekit_cli.replay._table import as_json, caveats, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.progress import TaskID

    from stablekit_cli.replay._chains import Chain
    from stablekit_cli.replay._play import Outcome
    from stablekit_monitors.run_log import RunLog

__all__ = ["replay"]


def replay(
    folder: Path,
    plugins: Sequence[str],
    spikes: Sequence[int],
    chart: Path | None,
    console: Console,
    *,
    json: bool,
) -> None:
    """Replay a run and show what the chains would have done.

    Raises:
        ChainError: A chain cannot be replayed.
        NoRunError: There is no run, or it has no norms.
    """
    chains = parse_chains(plugins)
    run, name = open_run(folder), name_of(folder)
    if not run.norms.size:
        raise NoRunError(f"{folder} holds no norms of tensors yet")
    known = spikes_of(run, spikes)
    outcomes = _play_all(run, chains, console, quiet=json)
    scores = [score(run, outcome, known.steps) for outcome in outcomes]
    target = folder / "replay.png" if chart is None else chart
    draw(target, name, run, outcomes, known)
    if json:
        console.print(
            as_json(name, run, scores, known), soft_wrap=True, highlight=False, markup=False
        )
        return
    console.print(table(name, run, scores, known))
    for caveat in caveats(run, scores):
        console.print(caveat, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Chart: {target}", soft_wrap=True, highlight=False, markup=False)


def _play_all(
    run: RunLog, chains: Sequence[Chain], console: Console, *, quiet: bool
) -> list[Outcome]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        tasks = [progress.add_task(chain.label, total=len(run)) for chain in chains]
        return [
            play(run, chain, partial(_advance, progress, task))
            for chain, task in zip(chains, tasks, strict=True)
        ]


def _advance(progress: Progress, task: TaskID, row: int) -> None:
    progress.update(task, completed=row)
