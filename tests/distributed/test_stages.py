"""With ``reduce_groups`` ranks that hold different parameters decide as one process would."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import stablekit
from stablekit.errors import AttachError
from tests.distributed.compare import assert_same
from tests.distributed.stages import BAD, SPIKE, STEPS, whole_mixture, whole_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    Seen = dict[str, Any]
    Group = Callable[[int], list[Seen]]

pytestmark = pytest.mark.distributed

ROUNDING = 1e-6
PIPELINES = [(2, "pipeline"), (2, "pipeline_in_device_mode"), (4, "pipeline")]
CASES = [*PIPELINES, (2, "experts"), (4, "experts")]

every_case = pytest.mark.parametrize(("world", "case"), CASES)


@functools.cache
def in_one_process(world: int, case: str) -> Seen:
    return whole_mixture(world) if case == "experts" else whole_pipeline(world)


def places(seen: Seen, single: Seen) -> list[int]:
    """Return where this rank's parameters are among those of one process."""
    if "stage" in seen:
        return [i for i, name in enumerate(single["names"]) if name[0] == str(seen["stage"])]
    return [single["names"].index(name) for name in seen["names"]]


@every_case
def test_norms_decisions_and_weights_are_those_of_one_process(
    group: Group, world: int, case: str
) -> None:
    single = in_one_process(world, case)
    for rank in group(world):
        seen = rank[case]
        here = places(seen, single)
        assert_same(
            seen["weights"], [single["weights"][i] for i in here], within=ROUNDING, path="weights"
        )
        for row, one in zip(seen["probe"], single["probe"], strict=True):
            assert row["ok"] == one["ok"]
            assert_same(row["loss"], one["loss"], within=ROUNDING, path="loss")
            assert_same(row["raw"], one["raw"][here], within=ROUNDING, path="raw")
            if row["ok"]:  # in device mode a skipped step is transformed all the same
                assert_same(row["norm"], one["norm"], within=ROUNDING, path="norm")
                assert_same(row["norms"], one["norms"][here], within=ROUNDING, path="norms")


@every_case
def test_all_ranks_see_the_same_bits_of_what_is_global(group: Group, world: int, case: str) -> None:
    first, *others = (seen[case]["probe"] for seen in group(world))
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            for what in ("norm", "loss", "ok"):
                assert_same(ours[what], theirs[what], path=what)


@every_case
def test_a_nan_or_a_high_loss_elsewhere_skips_the_step_here(
    group: Group, world: int, case: str
) -> None:
    for seen in group(world):
        skipped = [i for i, row in enumerate(seen[case]["probe"]) if not row["ok"]]
        assert skipped == [SPIKE, BAD]


@every_case
def test_the_rank_that_has_the_nan_names_the_tensor_and_the_others_know_it_is_not_theirs(
    group: Group, world: int, case: str
) -> None:
    for rank, seen in enumerate(group(world)):
        (event,) = (e for e in seen[case]["events"] if e["kind"] == "nonfinite")
        is_there = rank == world - 1 if case == "experts" else rank >= world // 2
        assert event["data"]["kind"] == "nan"
        assert bool(event["tensors"]) == is_there
        assert ("on other ranks" in event["message"]) != is_there


@pytest.mark.parametrize("world", [2, 4])
def test_the_last_loss_is_the_loss_of_every_stage(group: Group, world: int) -> None:
    for seen in group(world):
        assert len(seen["pipeline"]["probe"]) == STEPS
        assert all(row["loss"].isfinite() for row in seen["pipeline"]["probe"])


def test_an_unclipped_norm_costs_one_collective_for_each_group(group: Group) -> None:
    assert min(group(2)[0]["experts"]["collectives"]) == 2  # the norm, and the loss that is read


def test_what_is_no_process_group_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(TypeError, match="must hold process groups"):
        stablekit.attach(optimizer, reduce_groups=["stage"])  # type: ignore[list-item]
    with pytest.raises(AttachError, match="not in one of the reduce_groups"):
        stablekit.attach(optimizer, reduce_groups={"*": dist.GroupMember.NON_GROUP_MEMBER})
