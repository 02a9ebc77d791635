"""Ranks that attached different things are told so at their first step, all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.disagreements import ALIKE

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = pytest.mark.distributed

WORLDS = [2, 4]
SAID = {
    "plugins": "plugins: nonfinite-guard + zclip on {most}, nonfinite-guard on {last}",
    "sharded": "plugins: nonfinite-guard + zclip on {most}, nonfinite-guard on {last}",
    "order": "plugins: nonfinite-guard + zclip on {most}, zclip + nonfinite-guard on {last}",
    "setting": "zclip.z_thresh: 2.5 on {most}, 3.0 on {last}",
    "class": "agc is a: AGC on {most}, ZClip on {last}",
    "restriction": "agc sees: 'all' on {most}, include=('*.0*',)",
    "log_every": "log_every: 1 on {most}, 5 on {last}",
    "dry_run": "dry_run: False on {most}, True on {last}",
    "device_mode": "device_mode: False on {most}, True on {last}",
    "reduce_groups": "reduce_groups: none on {most}, * on {last}",
    "parameters": "number of parameters: 3 on {most}, 2 on {last}",
    "shapes": "shapes of parameters: (4,), ...",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", SAID)
def test_every_rank_says_what_differs_and_where(group: Group, world: int, what: str) -> None:
    most = {2: "rank 0", 4: "ranks 0, 1, 2"}[world]
    for seen in group(world):
        said = seen["disagreements"][what]
        assert said.startswith("AttachError: ranks that train together attached different things")
        assert SAID[what].format(most=most, last=f"rank {world - 1}") in said


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_are_alike_step_and_exchange_nothing_more(group: Group, world: int) -> None:
    for seen in group(world):
        assert seen["disagreements"][ALIKE] == ""


@pytest.mark.parametrize("world", WORLDS)
def test_other_parameters_hint_at_pipelines(group: Group, world: int) -> None:
    for seen in group(world):
        assert "the stages of a pipeline need reduce_groups=" in seen["disagreements"]["parameters"]


def test_ranks_that_do_not_come_are_named_and_fatal_only_where_they_are_needed(
    group: Group,
) -> None:
    first, second = (seen["absences"] for seen in group(2))
    late = "rank 1 of 2 did not reach the first step of this session within"
    assert first["copies"].startswith(f"{late} 0 s")  # 0.5: less than for ranks that share norms
    assert first["shards"].startswith(f"AttachError: {late} 1 s")
    assert second == {"copies": "", "shards": ""}


def test_ranks_that_train_another_model_may_differ(group: Group) -> None:
    for rank, seen in enumerate(group(4)):
        others = "ranks 2, 3" if rank < 2 else "ranks 0, 1"
        assert seen["strangers"]["said"].startswith(f"{others} attached something else")


@pytest.mark.parametrize("world", WORLDS)
def test_the_loss_of_one_rank_is_read_by_all(group: Group, world: int) -> None:
    for seen in group(world):
        assert seen["lonely_losses"]["host"] == [3.0, 4.0, 4.0]  # none in the third step
        *known, unknown = seen["lonely_losses"]["device"]
        assert known == [3.0, 4.0]
        assert math.isnan(unknown)
