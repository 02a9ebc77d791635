"""One picture of a running log: figures on top, loss and norm below, clipping, latest events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.text import Text

from stablekit_cli.report._clipping import clipping_of
from stablekit_cli.report._culprit import ALARMS
from stablekit_cli.report._rollbacks import returns_in
from stablekit_cli.report._text import counted, number, percent
from stablekit_cli.report._verdict import spikes_in
from stablekit_cli.watch._plot import Line, Plot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from rich.console import RenderableType

    from stablekit import Event
    from stablekit_cli.report._clipping import Clipping
    from stablekit_monitors.run_log import RunLog

__all__ = ["Pulse", "frame", "waiting"]

EVENTS = 5
PLUGINS = 3
LEAST = 3
MOST = 12


@dataclass(frozen=True)
class Pulse:
    """How the log grows."""

    rate: float | None
    """Steps a second."""
    age: float | None
    """Seconds since something was written."""


def frame(name: str, run: RunLog, pulse: Pulse, *, last: int, height: int) -> RenderableType:
    """Return the picture.

    Args:
        name: what to call the run.
        run: as far as it is recorded.
        pulse: how it grows.
        last: how many rows the plots show; 0 for all.
        height: lines of the terminal.
    """
    rows = slice(-last if last else None, None)
    clipping = clipping_of(run)[:PLUGINS]
    events = [event for event in run.events if not event.kind.endswith("-end")][-EVENTS:]
    taken = 2 + 2 + len(clipping) + max(1, len(events)) + 2
    plots = min(MOST, max(LEAST, (height - taken) // 2))
    parts: list[RenderableType] = [_title(name, run, pulse), _counts(run, pulse)]
    parts += _panel("loss", run, rows, plots, [("loss", "loss", "cyan")])
    thresholds = [key for key in run.scalars if key.endswith("/threshold")][:PLUGINS]
    norms = [("norm", "grad_norm", "cyan"), ("clipped", "grad_norm_clipped", "green")]
    colors = ("yellow", "magenta", "red")
    norms += [(key, key, color) for key, color in zip(thresholds, colors, strict=False)]
    parts += _panel("gradient norm", run, rows, plots, norms)
    parts += [_clipped(row) for row in clipping]
    parts += [_event(event) for event in events] or [Text("no events", style="dim")]
    return Group(*parts)


def waiting(folder: object) -> RenderableType:
    """Return what is shown until there is a run."""
    return Text(f"waiting for a run in {folder} (Ctrl-C ends)", style="dim", overflow="fold")


def _title(name: str, run: RunLog, pulse: Pulse) -> Text:
    step = f"step {int(run.steps[-1]):,}" if len(run) else "no step yet"
    text = Text.assemble((name, "bold"), "  ", step, no_wrap=True, overflow="crop")
    if pulse.rate is not None:
        text.append(f"  {number(pulse.rate)} steps/s")
    if pulse.age is not None:
        text.append("  ").append(f"written {_ago(pulse.age)} ago", style="dim")
    return text


def _counts(run: RunLog, pulse: Pulse) -> Text:
    skipped, spikes = int((~run.ok).sum()), spikes_in(run)
    text = Text(overflow="crop", no_wrap=True)
    text.append(counted(skipped, "step skipped", "steps skipped"), "bold red" if skipped else "")
    text.append("  ")
    text.append(counted(spikes, "spike"), "bold yellow" if spikes else "")
    returns = len(returns_in(run.events))
    if returns:
        text.append(f"  {counted(returns, 'rollback')}", "bold red")
    rates = _finite(run.scalars.get("lr", np.empty(0)))
    if rates.size:
        text.append(f"  lr {number(float(rates[-1]))}")
    return text


def _panel(
    title: str, run: RunLog, rows: slice, height: int, shown: list[tuple[str, str, str]]
) -> Iterator[RenderableType]:
    """Yield a heading with the last values, and the plot; nothing where nothing is recorded."""
    known = [
        (label, run.scalars[key][rows], color) for label, key, color in shown if key in run.scalars
    ]
    if not known:
        return
    heading = Text(no_wrap=True, overflow="crop")
    heading.append(title, "bold")
    values = _finite(np.concatenate([values for _, values, _ in known]))
    log = len(shown) > 1 or (
        values.size > 0 and values.min() > 0 and values.max() > 20 * values.min()
    )
    if log:
        heading.append(" (log)", "dim")
    for label, values, color in known:
        heading.append("  ")
        if len(shown) > 1:
            heading.append(f"{label} ", "dim")
        heading.append(number(_latest(values)), color)
    yield heading
    on_top = [*known[2:], *known[:2]]  # thresholds, where norms would hide them
    yield Plot([Line(values, color) for _, values, color in on_top], height, bool(log))


def _clipped(row: Clipping) -> Text:
    text = Text(no_wrap=True, overflow="crop")
    text.append(row.plugin, "bold")
    text.append(f"  clipped {percent(row.share)} of steps")
    if row.factor is not None:
        text.append(f", mean factor {number(row.factor)}")
    return text


def _event(event: Event) -> Text:
    text = Text(no_wrap=True, overflow="crop")
    text.append(f"{event.step:>8,} ")
    text.append(event.kind, "bold yellow" if event.kind in ALARMS else "bold")
    if event.tensors:
        text.append(f" {event.tensors[0]}", "cyan")
    text.append(f" {event.message}", "dim")
    return text


def _latest(values: NDArray[np.float64]) -> float:
    return float(values[-1]) if len(values) else float("nan")


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
