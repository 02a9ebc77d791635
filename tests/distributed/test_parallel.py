"""Models made parallel by torch's own functions are decided about as the whole model would be."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.distributed.compare import assert_same
from tests.distributed.parallel import BAD, DATA_SHARDS, STEPS, WORLDS, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    Seen = dict[str, Any]
    Group = Callable[[int], list[Seen]]

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("place", WORLDS)]

ROUNDING = 1e-6


@functools.cache
def in_one_process(shards: int) -> Seen:
    return whole(shards)


def ranks_of(group: Group, place: str) -> list[Seen]:
    return [seen["parallel"][place] for seen in group(WORLDS[place])]


def in_order(values: torch.Tensor, seen: Seen, single: Seen) -> torch.Tensor:
    """Return values by the names of one process, whatever order the groups give them here."""
    return values[[seen["names"].index(name) for name in single["names"]]]


def test_norms_and_largest_elements_are_those_of_the_whole(group: Group, place: str) -> None:
    single = in_one_process(DATA_SHARDS[place])
    for seen in ranks_of(group, place):
        for row, one in zip(seen["probe"], single["probe"], strict=True):
            assert_same(row["norm"], one["norm"], within=ROUNDING, path="norm")
            assert_same(row["loss"], one["loss"], within=ROUNDING, path="loss")
            for what in ("raw", "norms", "largest", "present"):
                ours = in_order(row[what], seen, single)
                assert_same(ours, one[what], within=ROUNDING, path=what)


def test_decisions_events_and_weights_are_those_of_the_whole(group: Group, place: str) -> None:
    single = in_one_process(DATA_SHARDS[place])
    for seen in ranks_of(group, place):
        assert [row["ok"] for row in seen["probe"]] == [row["ok"] for row in single["probe"]]
        assert_same(seen["weights"], single["weights"], within=ROUNDING, path="weights")
        for event, one in zip(seen["events"], single["events"], strict=True):
            facts = ("kind", "step", "plugin", "data")
            assert {key: event[key] for key in facts} == {key: one[key] for key in facts}
            assert set(event["tensors"]) == set(one["tensors"])


def test_all_ranks_see_the_same_bits(group: Group, place: str) -> None:
    first, *others = ranks_of(group, place)
    for other in others:
        for what in ("probe", "weights", "events", "collectives"):
            assert_same(first[what], other[what], path=what)


def test_only_the_step_with_the_nan_is_skipped(group: Group, place: str) -> None:
    for seen in ranks_of(group, place):
        assert [bool(row["ok"]) for row in seen["probe"]] == [i != BAD for i in range(STEPS)]
