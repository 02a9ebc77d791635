"""How many collectives a step costs; the table in docs/collectives.md is what is counted here.

``STABLEKIT_WRITE_DOCS=1 python -m pytest tests/distributed`` writes the table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.chains import catalogue, scales_by_norms
from tests.distributed.model import COUNTED

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = pytest.mark.distributed

NORM_SCALING = [name for name in catalogue() if scales_by_norms(name)]
PAGE = Path(__file__).parents[2] / "docs" / "collectives.md"
START, END = "<!-- counted by tests/distributed -->\n", "<!-- end -->\n"


def counted(group: Group, engine: str, name: str, *, loss: bool = False) -> int:
    """Return the most collectives that a step issued; the same on both ranks."""
    per_rank = [seen[f"counted {engine}"][name]["collectives"] for seen in group(2)]
    assert per_rank[0] == per_rank[1]
    steps = per_rank[0][COUNTED // 2 :] if loss else per_rank[0][: COUNTED // 2]
    most: int = max(sum(step.values()) for step in steps)
    return most


def table(group: Group) -> str:
    """Return the counts as a table."""
    rows = ["| attached | FSDP2 | FSDP2, loss observed | DDP | DDP, loss observed |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for name in group(2)[0]["counted fsdp2"]:
        counts = [
            counted(group, engine, name, loss=loss)
            for engine in ("fsdp2", "ddp")
            for loss in (False, True)
        ]
        rows.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows) + "\n"


def test_the_optimizer_alone_issues_none(group: Group) -> None:
    assert [counted(group, engine, "not attached") for engine in ("fsdp2", "ddp")] == [0, 0]


@pytest.mark.parametrize("name", NORM_SCALING)
def test_under_fsdp2_a_plugin_that_scales_by_norms_costs_one(group: Group, name: str) -> None:
    assert counted(group, "fsdp2", name) == 1
    assert counted(group, "fsdp2", name, loss=True) == 1


@pytest.mark.parametrize("name", ["clip-value", "global-norm(norm_type=inf)"])
def test_under_fsdp2_reading_largest_elements_costs_another(group: Group, name: str) -> None:
    assert counted(group, "fsdp2", name) == 2


def test_under_fsdp2_all_norm_scaling_plugins_and_the_loss_share_one(group: Group) -> None:
    assert counted(group, "fsdp2", "all that scale by norms", loss=True) == 1


@pytest.mark.parametrize("name", NORM_SCALING)
def test_under_ddp_it_costs_none_unless_it_reads_the_loss(group: Group, name: str) -> None:
    assert counted(group, "ddp", name) == 0
    assert counted(group, "ddp", name, loss=True) <= 1


def test_the_page_on_collectives_holds_what_was_counted(group: Group) -> None:
    before, start, rest = PAGE.read_text().partition(START)
    written, end, after = rest.partition(END)
    if os.environ.get("STABLEKIT_WRITE_DOCS"):
        PAGE.write_text(before + start + table(group) + end + after)
        return
    assert written == table(group)
