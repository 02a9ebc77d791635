"""The table that ``session.summary()`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablekit._session import Session

_SHOWN = 6


def summarize(session: Session) -> str:
    """Return counters, then one row a plugin, then the latest events."""
    metrics = session.latest.read()
    clipped = session.latest.clipped_steps()
    rows = [("plugin", "steps clipped", "threshold")]
    for name in session.plugins:
        count = clipped.get(name, 0)
        share = count / session.number if session.number else 0.0
        threshold = metrics.get(f"{name}/threshold")
        acts = f"{name}/clipped" in metrics or not session.number
        rows.append(
            (
                name,
                f"{count} ({share:.1%})" if acts else "-",
                "-" if threshold is None else f"{threshold:.4g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{session.number} steps, {session.updates} updates, {session.skipped} skipped,"
        f" {len(session.events)} events",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]
    if len(session.events) > _SHOWN:
        lines.append(f"the last {_SHOWN} events of session.events:")
    for event in session.events[-_SHOWN:]:
        said = f"step {event.step}: {event.kind}"
        lines.append(f"{said}{': ' + event.message if event.message else ''}")
    return "\n".join(lines)
