"""How many collectives a step costs; the table in docs/collectives.md is what is counted here.

``STABLEKIT_WRITE_DOCS=1 python -m pytest tests/distributed`` writes the table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import stablekit

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "collectives.md"
START, END = "<!-- counted by tests/distributed -->\n", "<!-- end -->\n"
LARGEST = {"clip-value", "global-norm(norm_type=inf)"}


def counted(group: Group, run: str, name: str) -> int:
    """Return the most collectives that a step of a run issued; the same on both ranks."""
    per_rank = [seen[run][name]["collectives"] for seen in group(2)]
    assert per_rank[0] == per_rank[1]
    most: int = max(sum(step.values()) for step in per_rank[0])
    return most


def table(group: Group) -> str:
    """Return the counts as a table."""
    rows = ["| attached | FSDP2 | FSDP2, loss observed | DDP | DDP, loss observed |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for name in group(2)[0]["counted fsdp2"]:
        counts = [counted(group, f"counted {run}", name) for run in ("fsdp2", "fsdp2 loss")]
        counts += [counted(group, f"counted {run}", name) for run in ("ddp", "ddp loss")]
        rows.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows) + "\n"


def test_the_optimizer_alone_issues_none(group: Group) -> None:
    assert [counted(group, f"counted {run}", "not attached") for run in ("fsdp2", "ddp")] == [0, 0]


@pytest.mark.parametrize("name", stablekit.available())
def test_under_fsdp2_a_plugin_costs_one_and_another_if_it_reads_largest_elements(
    group: Group, name: str
) -> None:
    most = 2 if name in LARGEST else 1
    assert counted(group, "counted fsdp2", name) == most
    assert counted(group, "counted fsdp2 loss", name) == most


def test_under_fsdp2_all_norm_scaling_plugins_and_the_loss_share_one(group: Group) -> None:
    assert counted(group, "counted fsdp2 loss", "all that scale by norms") == 1


@pytest.mark.parametrize("name", stablekit.available())
def test_under_ddp_a_plugin_that_does_not_read_the_loss_costs_none(group: Group, name: str) -> None:
    assert counted(group, "counted ddp", name) == 0
    assert counted(group, "counted ddp loss", name) <= 1


def test_the_page_on_collectives_holds_what_was_counted(group: Group) -> None:
    before, start, rest = PAGE.read_text().partition(START)
    written, end, after = rest.partition(END)
    if os.environ.get("STABLEKIT_WRITE_DOCS"):
        PAGE.write_text(before + start + table(group) + end + after)
        return
    assert written == table(group)
