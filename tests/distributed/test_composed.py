"""Compiled, checkpointed, accumulated, in mixed precision: clipping is what torch's would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.compare import assert_same
from tests.distributed.composed import STEPS, WAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("way", WAYS)]

ROUNDING = 1e-6


def test_norms_and_weights_are_those_of_clipping_by_hand(group: Group, way: str) -> None:
    for seen in group(2):
        ours, by_hand = seen["composed"][way]["ours"], seen["composed"][way]["by hand"]
        assert_same(ours["norms"], by_hand["norms"], within=ROUNDING, path="norms")
        assert_same(ours["weights"], by_hand["weights"], within=ROUNDING, path="weights")


def test_steps_were_clipped(group: Group, way: str) -> None:
    for seen in group(2):
        assert seen["composed"][way]["ours"]["clipped"] >= STEPS - 1


def test_parameters_keep_their_names(group: Group, way: str) -> None:
    for seen in group(2):
        assert seen["composed"][way]["ours"]["named as before"]


def test_both_ranks_see_the_same_bits(group: Group, way: str) -> None:
    first, second = (seen["composed"][way]["ours"] for seen in group(2))
    assert_same(first, second)
