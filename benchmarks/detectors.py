"""``python -m benchmarks.detectors``: how well rules find labelled spikes, and how often they err.

The streams are those of ``tests/monitors/labelled.py``. The settings of SpikeMonitor were chosen on
other seeds of the synthetic ones and on the recorded ones.

Steps in which a rule says "spike" are one alarm where they are at most ten steps apart. An alarm is
right if any of its steps, or the one after, is labelled. Recall is the share of labelled spikes in
which some step was flagged, precision the share of right alarms. "Wrong steps" are flagged steps
outside of labelled spikes; they tell a rule that stays on after a spike from one that errs once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from benchmarks.detector_rules import RULES
from benchmarks.table import write_into
from tests.monitors.labelled import recorded, streams

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.detector_rules import Flags, Rule
    from tests.monitors.labelled import Stream

MERGE = 10
SEEDS = (3, 4, 5)
_HEADS = ("streams", "rule", "found", "precision", "false alarms / 1000", "wrong steps / 1000")


@final
@dataclass(frozen=True)
class Tally:
    """What came of a rule on some streams."""

    steps: int = 0
    spikes: int = 0
    found: int = 0
    alarms: int = 0
    right: int = 0
    wrong_steps: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Return the sums."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Tally(*(a + b for a, b in pairs))

    @property
    def recall(self) -> float:
        """Share of spikes found; NaN where there are none."""
        return self.found / self.spikes if self.spikes else float("nan")

    @property
    def precision(self) -> float:
        """Share of alarms that are right; NaN where there are none."""
        return self.right / self.alarms if self.alarms else float("nan")

    @property
    def false_alarms(self) -> float:
        """False alarms in a thousand steps."""
        return 1000 * (self.alarms - self.right) / self.steps

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the columns."""
        return (
            f"{self.found}/{self.spikes}" if self.spikes else "",
            f"{self.precision:.0%}" if self.alarms else "",
            f"{self.false_alarms:.2f}",
            f"{1000 * self.wrong_steps / self.steps:.1f}",
        )


def tally(stream: Stream, flags: Flags) -> Tally:
    """Compare what a rule said with what is so."""
    labelled, settling = (np.zeros(len(flags), dtype=bool) for _ in range(2))
    for start, stop in stream.spikes:
        labelled[start : stop + 1] = True
    for start, stop in stream.settling:
        settling[start:stop] = True
    groups = alarms(flags)
    right = sum(bool(labelled[group].any()) for group in groups)
    unclear = sum(bool(settling[group].any() and not labelled[group].any()) for group in groups)
    return Tally(
        steps=len(flags),
        spikes=len(stream.spikes),
        found=sum(bool(flags[start:stop].any()) for start, stop in stream.spikes),
        alarms=len(groups) - unclear,
        right=right,
        wrong_steps=int((flags & ~labelled & ~settling).sum()),
    )


def alarms(flags: Flags) -> list[list[int]]:
    """Return flagged steps, those close to one another together."""
    groups: list[list[int]] = []
    for step in np.flatnonzero(flags).tolist():
        if groups and step - groups[-1][-1] <= MERGE:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def measure(rules: Mapping[str, Rule], labelled: Iterable[Stream]) -> dict[str, dict[str, Tally]]:
    """Return group -> rule -> what came of it, with a last group of all."""
    found: dict[str, dict[str, Tally]] = {}
    for stream in labelled:
        for name, rule in rules.items():
            result = tally(stream, rule(stream.values, stream.signal))
            rows = found.setdefault(stream.group, {})
            rows[name] = rows.get(name, Tally()) + result
    groups = list(found.values())
    found["all"] = {name: sum((rows[name] for rows in groups), Tally()) for name in rules}
    return found


def lines(found: Mapping[str, Mapping[str, Tally]]) -> list[tuple[str, ...]]:
    """Return the table as rows of texts, a line for each group and rule."""
    rows = [
        (group if i == 0 else "", name, *result.cells())
        for group, results in found.items()
        for i, (name, result) in enumerate(results.items())
    ]
    return [_HEADS, *rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print, or write into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectors", description=__doc__)
    parser.add_argument("--markdown", type=Path, help="a page whose table is replaced")
    options = parser.parse_args(arguments)
    rows = lines(measure(RULES, [*streams(SEEDS), *recorded()]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    if options.markdown is not None:
        marked = [rows[0], ("---",) * len(_HEADS), *rows[1:]]
        write_into(options.markdown, "\n".join(f"| {' | '.join(row)} |" for row in marked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
