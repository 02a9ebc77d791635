"""The commands and their options; what they do is imported when they run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app"]

app = typer.Typer(
    name="stablekit",
    help="Plugin-based optimizer and training-stability middleware for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED_CHECK = 1
USAGE_ERROR = 2


class WorkloadName(str, Enum):
    """Training jobs of the demo."""

    shards = "shards"
    shards_adamw = "shards-adamw"
    rnn = "rnn"
    digits = "digits"


@app.command()
def demo(
    workload: Annotated[
        WorkloadName,
        typer.Option(
            help="shards: transformer on Python's own files, some of them compiled, with SGD or "
            "(shards-adamw) AdamW; rnn: exploding gradients of a character RNN; digits: late loss "
            "spikes of Adam."
        ),
    ] = WorkloadName.shards,
    steps: Annotated[
        int | None, typer.Option(min=10, help="Steps per arm. Default: as the workload needs.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Initial weights and order of the data.")] = 0,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated: none, clip, plugin names with keywords "
            "(autoclip:percentile=50), chains joined with + (global-norm+autoclip)."
        ),
    ] = "none,clip,zclip,autoclip,adagc",
    guard: Annotated[
        bool,
        typer.Option(help="Put nonfinite-guard in front of every chain of plugins without one."),
    ] = True,
    out: Annotated[
        Path, typer.Option(help="Folder for chart, figures and TensorBoard logs.", file_okay=False)
    ] = Path("runs/demo"),
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch; the models are too small for many.")
    ] = 1,
) -> None:
    """Train one unstable job under several protections and compare them.

    Exits with 1 if a protected arm did not skip the injected NaN or did not finish finite.
    """
    import torch

    from stablekit_cli.demo._run import UsageError, run_demo

    torch.set_num_threads(threads)
    try:
        passed = run_demo(workload.value, steps, seed, arms, guard, out, _console())
    except UsageError as error:
        _refuse(str(error))
    if not passed:
        typer.echo("stablekit demo: a protected arm failed its check (see above)", err=True)
        raise typer.Exit(FAILED_CHECK)


@app.command()
def plugins(
    json: Annotated[bool, typer.Option("--json", help="As JSON instead of a table.")] = False,
) -> None:
    """List the installed plugins and surgeries."""
    from stablekit_cli._catalogue import as_json, as_table

    if json:
        typer.echo(as_json())
    else:
        _console().print(as_table())


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a plugin, e.g. zclip.")]) -> None:
    """Describe one plugin or surgery: constructor, defaults, paper, hooks, cost."""
    from stablekit_cli._catalogue import UnknownNameError, describe

    try:
        description = describe(name)
    except UnknownNameError as error:
        _refuse(str(error))
    typer.echo(description)


RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Folder of a recorded run: what Recorder(path) was given.",
    ),
]


@app.command()
def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option(help="The HTML file.", show_default="RUN/report.html")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what happened in a run as one HTML file that needs no network."""
    from stablekit_cli._runs import NoRunError, name_of, open_run
    from stablekit_cli.report._write import write_report

    target = run / "report.html" if output is None else output
    try:
        verdict = write_report(open_run(run), target, name=name_of(run))
    except (NoRunError, OSError) as error:
        _refuse(str(error))
    typer.echo(verdict.text)
    typer.echo(f"Written: {target}")
    if open_it:
        typer.launch(target.resolve().as_uri())


@app.command()
def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option(help="Draw one picture and return.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    last: Annotated[int, typer.Option(min=0, help="Steps in the plots; 0 for all.")] = 1000,
) -> None:
    """Follow a run in the terminal while it is recorded; Ctrl-C ends."""
    from stablekit_cli._runs import NoRunError
    from stablekit_cli.watch._live import watch as follow

    try:
        follow(run, _console(), once=once, every=every, last=last)
    except (NoRunError, ValueError) as error:
        _refuse(str(error))


@app.command()
def replay(
    run: RunFolder,
    plugin: Annotated[
        list[str],
        typer.Option(
            help="Plugin with keywords (adagc:lambda_rel=1.05), or a chain joined with + "
            "(nonfinite-guard+zclip); give the option once for each to be compared."
        ),
    ],
    spikes: Annotated[
        str,
        typer.Option(
            help="Steps to be caught, as 120,340. Default: those reported while it was recorded."
        ),
    ] = "",
    chart: Annotated[
        Path | None, typer.Option(help="The PNG file.", show_default="RUN/replay.png")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON instead of a table.")] = False,
) -> None:
    """Tell what plugins would have clipped in a recorded run, without training."""
    from stablekit_cli._runs import NoRunError
    from stablekit_cli.replay._chains import ChainError
    from stablekit_cli.replay._run import replay as play

    try:
        steps = [int(step) for step in spikes.split(",") if step.strip()]
    except ValueError:
        _refuse(f"--spikes takes numbers of steps separated by commas, got {spikes!r}")
    try:
        play(run, plugin, steps, chart, _console(), json=json)
    except (ChainError, NoRunError, OSError) as error:
        _refuse(str(error))


def _console() -> Console:
    """Return a console wide enough for the tables where neither terminal nor COLUMNS say it."""
    import os

    from rich.console import Console

    console = Console()
    says_width = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return console if says_width else Console(width=max(console.width, 120))


def _refuse(message: str) -> NoReturn:
    typer.echo(f"stablekit: {message}", err=True)
    raise typer.Exit(USAGE_ERROR)
