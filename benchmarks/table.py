"""The rows of the table, and the two forms in which it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_HEADS = ("what", "workload", "threads", "ours", "against", "theirs", "figure", "target", "met")
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"


@final
@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: what was measured.
        ours: seconds, or a count.
        workload: on which tensors.
        against: what it is compared with; empty where the figure is ``ours`` itself.
        theirs: seconds of that.
        target: the largest figure allowed; None for a row that only informs.
        unit: "s", or what is counted.
        threads: how many threads torch had.
    """

    what: str
    ours: float
    workload: str = ""
    against: str = ""
    theirs: float | None = None
    target: float | None = None
    unit: str = "s"
    threads: int = 0

    @property
    def figure(self) -> float:
        """What the target is about: the ratio, or ours alone."""
        return self.ours if self.theirs is None else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the figure is within the target, None without one."""
        return None if self.target is None else self.figure <= self.target

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the columns."""
        unit = "" if self.theirs is not None else f" {self.unit}"
        digits = 0 if self.unit != "s" else 2
        return (
            self.what,
            self.workload,
            str(self.threads),
            _amount(self.ours, self.unit),
            self.against,
            "" if self.theirs is None else _amount(self.theirs, self.unit),
            f"{self.figure:.{digits}f}{unit}",
            "" if self.target is None else f"{self.target:.{digits}f}{unit}",
            {None: "", True: "yes", False: "NO"}[self.met],
        )


def plain(rows: Sequence[Row]) -> str:
    """Return the table with aligned columns."""
    lines = [_HEADS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def markdown(rows: Iterable[Row]) -> str:
    """Return the table as Markdown."""
    lines = [_HEADS, ("---",) * len(_HEADS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_into(page: Path, text: str) -> None:
    """Replace what stands between the two markers of a page.

    Raises:
        ValueError: The page has no markers.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, also_found, after = rest.partition(_END)
    if not (found and also_found):
        raise ValueError(f"{page.name} must hold {_BEGIN!r} and after it {_END!r}")
    page.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}", encoding="utf-8")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f}"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
