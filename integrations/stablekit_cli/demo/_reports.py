"""The logs that the arms leave, and their reports, each with links to the others."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from stablekit_cli.report._verdict import spikes_in
from stablekit_cli.report._write import write_report
from stablekit_monitors.run_log import read_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stablekit_cli.demo._arms import Arm
    from stablekit_cli.demo._training import Run

__all__ = ["fresh_log", "log_of", "write_reports"]

HEADER = "run.json"
"""The file that makes a folder a run."""


def log_of(out: Path, arm: Arm) -> Path:
    """Return the folder into which an arm records."""
    return out / "logs" / arm.slug


def fresh_log(out: Path, arm: Arm) -> Path:
    """Return that folder after removing the log of an earlier demo."""
    folder = log_of(out, arm)
    if (folder / HEADER).exists():
        shutil.rmtree(folder)
    return folder


def write_reports(out: Path, runs: Sequence[Run], workload: str) -> Arm | None:
    """Write a report into every log, and the most telling one beside the chart.

    That is the one with the most spikes. Returned is its arm, None where nothing was recorded.
    """
    arms = [run.arm for run in runs if (log_of(out, run.arm) / HEADER).exists()]
    if not arms:
        return None
    logs = [read_run(log_of(out, arm)) for arm in arms]
    names = [f"stablekit demo, {workload}: {arm.label}" for arm in arms]
    for arm, log, name in zip(arms, logs, names, strict=True):
        links = [(one.label, f"../{one.slug}/report.html" * (one is not arm)) for one in arms]
        write_report(log, log_of(out, arm) / "report.html", name=name, links=links)
    most = max(range(len(logs)), key=lambda i: spikes_in(logs[i]))
    links = [
        (arm.label, f"logs/{arm.slug}/report.html" * (i != most)) for i, arm in enumerate(arms)
    ]
    write_report(logs[most], out / "report.html", name=names[most], links=links)
    return arms[most]
