"""The result of a replay as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from stablekit_cli.demo._palette import folded
from stablekit_cli.replay._spikes import not_finite
from stablekit_cli.report._text import counted, listed, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stablekit_cli.replay._score import Score
    from stablekit_cli.replay._spikes import Spikes
    from stablekit_monitors.run_log import RunLog

__all__ = ["as_json", "caveats", "table"]

SHOWN = 6
LABEL = 22
HEADINGS = (
    "threshold\nmedian", "threshold\nat the end", "steps\nclipped", "share", "mean\nfactor",
    "steps\nskipped", "spikes\ncaught", "not finite\nskipped", "mean factor\nat spikes",
)  # fmt: skip


def table(name: str, run: RunLog, scores: Sequence[Score], spikes: Spikes) -> Table:
    """Return one row per chain."""
    made = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=Text(f"{name}: {counted(len(run), 'recorded step')}, {len(run.names)} tensors"),
        caption=Text(_known(run, spikes)),
    )
    made.add_column("plugins", no_wrap=True, overflow="fold")
    for heading in HEADINGS:
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("missed\nat", min_width=6)
    for one in scores:
        made.add_row(Text(folded(one.label, LABEL)), *_cells(one))
    return made


def caveats(run: RunLog, scores: Sequence[Score]) -> Iterator[str]:
    """Yield what must be known to read the table."""
    if len(run) and int(run.stride.max()) > 1:
        yield (
            f"APPROXIMATE: the log was thinned, one row stands for up to {int(run.stride.max())}"
            " steps; plugins see only the rows that are left."
        )
    for one in scores:
        if one.stopped:
            yield f"{one.label} ended the run {one.stopped}"
    yield (
        "The gradients are those of the recorded run: what another plugin would have made of the"
        " weights, and so of later gradients, is not in them."
    )


def as_json(name: str, run: RunLog, scores: Sequence[Score], spikes: Spikes) -> str:
    """Return the figures as strict JSON; what is not known is null."""
    content = {
        "run": name,
        "rows": len(run),
        "tensors": len(run.names),
        "approximate": bool(len(run)) and int(run.stride.max()) > 1,
        "spikes": {**asdict(spikes), "not_finite": not_finite(run, spikes.steps)},
        "chains": [asdict(one) for one in scores],
    }
    return json.dumps(_plain(content), indent=1, allow_nan=False)


def _cells(one: Score) -> Iterator[str]:
    missed = ", ".join(map(str, one.missed[:SHOWN]))
    yield from (number(one.threshold_median), number(one.threshold_last))
    yield from (f"{one.clipped:,}", percent(one.share), number(one.factor), f"{one.skipped:,}")
    yield _share_of(one, finite=True)
    yield _share_of(one, finite=False)
    yield number(one.factor_at_spikes)
    yield missed + (", ..." if len(one.missed) > SHOWN else "") or "-"


def _share_of(one: Score, *, finite: bool) -> str:
    """Return of how many known steps that are finite, or that are not, it met how many."""
    met, all_of = (
        sum((step not in one.not_finite) == finite for step in steps)
        for steps in (one.caught, one.caught + one.missed)
    )
    return f"{met} of {all_of}" if all_of else "-"


def _known(run: RunLog, spikes: Spikes) -> str:
    """Say how many steps are known to be bad, and who says so."""
    lost = len(not_finite(run, spikes.steps))
    parts = [counted(len(spikes.steps) - lost, "spike")]
    parts += [f"{counted(lost, 'step')} not finite"] * bool(lost)
    return f"{listed(parts)}: {spikes.source}"


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is recursive
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
