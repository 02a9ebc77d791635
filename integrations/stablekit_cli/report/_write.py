"""A recorded run as one HTML file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from stablekit_cli.report._clipping import clipping_of
from stablekit_cli.report._curves import curves_of
from stablekit_cli.report._events import kinds_of, marks_of, rows_of
from stablekit_cli.report._heat import heat_of
from stablekit_cli.report._pack import packed
from stablekit_cli.report._page import page
from stablekit_cli.report._rollbacks import returns_in
from stablekit_cli.report._text import counted, number, percent
from stablekit_cli.report._verdict import spikes_in, verdict_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stablekit_cli.report._curves import Curves
    from stablekit_cli.report._heat import Heat
    from stablekit_cli.report._verdict import Verdict
    from stablekit_monitors.run_log import RunLog

__all__ = ["write_report"]


def write_report(
    run: RunLog, path: Path, *, name: str, links: Sequence[tuple[str, str]] = ()
) -> Verdict:
    """Write the report of a run and return what it says on top.

    Args:
        run: what was recorded.
        path: the file; its folder must exist.
        name: what to call the run.
        links: labels and addresses of reports to go to; this one has an empty address.
    """
    marks = marks_of(run.events)
    curves, heat = curves_of(run, [step for step, _ in marks]), heat_of(run)
    verdict = verdict_on(run)
    spans = [(end, start) for start, end in returns_in(run.events)]
    content = {"name": name, "links": links, "verdict": verdict, **_content(run, curves, heat)}
    path.write_text(page(content, packed(curves, heat, marks, spans)), "utf-8")
    return verdict


def _content(run: RunLog, curves: Curves, heat: Heat | None) -> dict[str, Any]:
    panels = {line.panel for line in curves.lines if len(run)}
    return {
        "tiles": _tiles(run),
        "has_loss": "loss" in panels,
        "has_norm": "norm" in panels,
        "has_heat": heat is not None,
        "thinned": _thinned(run, curves, heat),
        "clipping": clipping_of(run),
        "kinds": kinds_of(run.events),
        "rows": rows_of(run.events),
        "event_count": len(run.events),
        "facts": _facts(run),
    }


def _tiles(run: RunLog) -> list[tuple[str, str, str]]:
    norms, losses = (run.scalars.get(key, np.empty(0)) for key in ("grad_norm", "loss"))
    tiles = [("steps", f"{int(run.stride.sum()):,}", ""), ("spikes", f"{spikes_in(run):,}", "")]
    tiles.append(("steps skipped", f"{int((~run.ok).sum()):,}", ""))
    clipped = [row.share for row in clipping_of(run)]
    if clipped:
        tiles.append(
            ("steps clipped", percent(max(clipped)), "by the busiest plugin" * (len(clipped) > 1))
        )
    tiles += _extreme("last loss", losses, run, last=True)
    tiles += _extreme("largest norm", norms, run, last=False)
    return tiles


def _extreme(
    label: str, values: np.ndarray[Any, Any], run: RunLog, *, last: bool
) -> list[tuple[str, str, str]]:
    rows = np.flatnonzero(np.isfinite(values))
    if not rows.size:
        return []
    row = rows[-1] if last else rows[np.argmax(values[rows])]
    return [(label, number(float(values[row])), f"step {int(run.steps[row]):,}")]


def _thinned(run: RunLog, curves: Curves, heat: Heat | None) -> str:
    """Say what of the run is not in the page."""
    notes = []
    if curves.thinned:
        notes.append(
            f"Lines show {len(curves.steps):,} of {counted(len(run.steps), 'recorded step')}: the"
            " extremes of every stretch, and all steps around events."
        )
    if heat is not None and heat.width > 1:
        notes.append(f"A cell of the table of norms is the largest of {heat.width:,} steps.")
    if run.stride.size and int(run.stride.max()) > 1:
        notes.append(
            "The log itself was thinned while it was written; where it was, one row stands for"
            f" up to {int(run.stride.max()):,} steps."
        )
    return " ".join(notes)


def _facts(run: RunLog) -> list[tuple[str, list[str]]]:
    header = run.header
    plugins = header.get("plugins") or {}
    listed = [f"{name}: {shown}" for name, shown in plugins.items()]
    facts = [
        ("plugins", listed),
        ("optimizers", [str(one) for one in header.get("optimizers") or ()]),
        ("tensors", [_size(run)]),
        ("steps", [_span(run)]),
        ("dry run", ["nothing that plugins decided was carried out"] * bool(header.get("dry_run"))),
        ("started", [str(header["started"])] if header.get("started") else []),
        ("stablekit", [str(header["stablekit"])] if header.get("stablekit") else []),
    ]
    return [(label, values) for label, values in facts if values]


def _size(run: RunLog) -> str:
    shapes = run.header.get("shapes") or []
    elements = sum(math.prod(shape) for shape in shapes)
    return f"{len(run.names):,}" + (f", {elements:,} parameters" if elements else "")


def _span(run: RunLog) -> str:
    if not len(run.steps):
        return "none"
    return f"{int(run.steps[0]):,} to {int(run.steps[-1]):,}"
