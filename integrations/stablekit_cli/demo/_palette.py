"""Colours and line styles of the chart; Okabe and Ito's palette suits colour-blind readers."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stablekit_cli.demo._arms import CLIP, NONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stablekit_cli.demo._arms import Arm

__all__ = ["GREY", "INJECTED", "INK", "Style", "folded", "plain_frame", "styles_of"]

INK = "#222222"
GREY = "#666666"
INJECTED = "#CC79A7"
FIXED = {NONE: "#D55E00", CLIP: "#7F7F7F"}
OTHERS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#882255")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, in every panel."""

    color: str
    dash: str


def styles_of(arms: list[Arm]) -> list[Style]:
    """Return the style of every arm; ``none`` and ``clip`` look the same in every chart."""
    free = itertools.cycle(Style(color, dash) for dash in DASHES for color in OTHERS)
    return [Style(FIXED[arm.label], "-") if arm.label in FIXED else next(free) for arm in arms]


def folded(label: str, width: int) -> str:
    """Break a long label after the signs that separate its parts.

    Example:
        >>> folded("global-norm+autoclip:percentile=50", 20).splitlines()
        ['global-norm+', 'autoclip:', 'percentile=50']
    """
    lines = [""]
    for part in re.findall(r"[^+:,]*[+:,]?", label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def plain_frame(axes: Axes) -> None:
    """Remove the frame and leave a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9)
