"""The tables: runs, what clipping adds there, where the time goes, and what was assumed."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, final

from benchmarks.scaling.evaluation import TORCH, WAYS
from benchmarks.scaling.machine import H100, Times
from benchmarks.scaling.members import MEMBERS
from benchmarks.scaling.model import step_cost
from benchmarks.scaling.plan import GUARDED
from benchmarks.scaling.sizes import Mesh, held

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.check import Checked
    from benchmarks.scaling.evaluation import Evaluated
    from benchmarks.scaling.machine import Machine


@final
class Table:
    """Heads and rows of text."""

    def __init__(self, title: str, *heads: str) -> None:
        """Start without rows."""
        self.title = title
        self.rows: list[tuple[str, ...]] = [heads]

    def add(self, *cells: str) -> None:
        """Append a row."""
        self.rows.append(cells)

    def plain(self) -> str:
        """Return the table with aligned columns."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows]
        return "\n".join([self.title, "", *lines])

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rows = [self.rows[0], ("---",) * len(self.rows[0]), *self.rows[1:]]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def all_tables(evaluated: Sequence[Evaluated]) -> list[Table]:
    """Return all tables of the page."""
    return [_runs(evaluated), _costs(evaluated), _terms(evaluated), _plugins(), _assumptions(H100)]


def checked_table(rows: Sequence[Checked]) -> Table:
    """Return what was compared, one line a term."""
    heads = ("term", "compared", "wrong", "error / tolerance, at most", "where")
    table = Table("Model against what was counted", *heads)
    for term in dict.fromkeys(row.term for row in rows):
        of_term = [row for row in rows if row.term == term]
        worst = max(of_term, key=lambda row: row.off)
        wrong = sum(not row.holds for row in of_term)
        where = f"{worst.where}: {worst.chain}" if worst.off else ""
        table.add(term, str(len(of_term)), str(wrong), f"{worst.off:.2f}", where)
    return table


def duration(seconds: float) -> str:
    """Return a time with two or three digits.

    Example:
        >>> duration(0), duration(2e-8), duration(0.00025), duration(0.0025), duration(2.5)
        ('0', '< 1 us', '250 us', '2.50 ms', '2.5 s')
    """
    if seconds == 0:
        return "0"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us" if seconds >= 1e-6 else "< 1 us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"


def amount(number: float, unit: str = "") -> str:
    """Return a number with three digits and a prefix.

    Example:
        >>> amount(12), amount(1234, "B"), amount(405e9)
        ('12', '1.23 kB', '405 G')
    """
    power = min(int(math.log10(number) // 3), 4) if number >= 1000 else 0
    return f"{number / 1000**power:.3g} {' kMGT'[power]}{unit}".replace("  ", " ").strip()


def words(name: str) -> str:
    """Return the name of a term as words."""
    return name.replace("_", " ")


def _runs(evaluated: Sequence[Evaluated]) -> Table:
    heads = ("run", "ranks", "spread", "tensors here", "elements here", "tokens", "step")
    table = Table("The runs", *heads)
    for one in evaluated:
        if one.chain == TORCH:
            where, here = one.deployment, one.deployment.held
            numbers = (f"{here.tensors:,}", amount(here.elements), amount(where.tokens))
            ranks = f"{where.mesh.ranks:,}"
            table.add(where.name, ranks, str(where.mesh), *numbers, duration(one.step))
    return table


def _costs(evaluated: Sequence[Evaluated]) -> Table:
    table = Table("What clipping adds to a step", "run", *(" + ".join(way) for way in WAYS))
    for i in range(0, len(evaluated), len(WAYS)):
        of_run = evaluated[i : i + len(WAYS)]
        cells = [f"{duration(one.times.total)}, {100 * one.share:.2g}%" for one in of_run]
        table.add(evaluated[i].deployment.name, *cells)
    return table


def _terms(evaluated: Sequence[Evaluated]) -> Table:
    names = [field.name for field in fields(Times)]
    heads = ("run", "all-reduces", "reduced", *map(words, names), "first bottleneck")
    table = Table(f"Where the time of {' + '.join(GUARDED)} goes", *heads)
    for one in evaluated:
        if one.chain == GUARDED:
            parts = [duration(getattr(one.times, name)) for name in names]
            numbers = (str(len(one.cost.reductions)), amount(one.cost.payload, "B"))
            table.add(one.deployment.name, *numbers, *parts, words(one.times.first))
    return table


def _plugins() -> Table:
    """Return the terms of each plugin alone, from what one matrix more makes of them."""
    heads = ("plugin", "passes", "of these in the kernel", "all-reduces", "floats reduced")
    more = ("kernels", "kernels a matrix", "reads in host mode", "bytes kept a tensor")
    table = Table("Terms of each plugin, attached alone, sharded", *heads, *more)
    mesh = Mesh(shard=2)
    for name, member in MEMBERS.items():
        if name.startswith("reads"):
            continue
        few, many = (step_cost([name], held([(8, 8)] * count, mesh), mesh) for count in (3, 4))
        by_units = " + 2 U + V" if "units" in member.asks else ""
        floats = (many.payload - few.payload) // 4 - (16 if by_units else 0)
        table.add(
            f"`{name}`",
            f"{few.passes:g}",
            f"{few.stored:g}",
            str(len(few.reductions)),
            f"{floats} P + 4{by_units}",
            f"{few.kernels_once:g}",
            f"{many.kernels - few.kernels + many.each - few.each:g}",
            f"{1 + member.host_reads}",
            f"{many.held - few.held:g}",
        )
    return table


def _assumptions(of: Machine) -> Table:
    table = Table("Assumptions", "of an H100 SXM in a machine of eight", "figure")
    table.add("dense bf16 peak", f"{of.flops / 1e12:.0f} TFLOP/s")
    table.add("share of it that training reaches", f"{of.utilisation:.0%}")
    table.add("HBM3 bandwidth", f"{of.memory / 1e12:.2f} TB/s")
    table.add("share of it that a pass over the gradients reaches", f"{of.memory_share:.0%}")
    table.add("a small kernel, or the host's time to issue one", duration(of.kernel))
    table.add("tensors in one launch of a multi-tensor kernel", str(of.batch))
    table.add("a value read on the host, and the gap after it", duration(of.read))
    table.add("NVLink, one direction", f"{of.inside / 1e9:.0f} GB/s")
    table.add("InfiniBand for each accelerator", f"{of.outside / 1e9:.0f} GB/s")
    table.add("start of a collective", duration(of.start))
    table.add("hop of its tree in a machine", duration(of.hop_inside))
    table.add("hop of its tree between machines", duration(of.hop_outside))
    return table
