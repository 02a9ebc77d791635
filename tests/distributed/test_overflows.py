"""What a GradScaler finds on one rank holds for all ranks, or the scaler is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.distributed.compare import assert_same
from tests.distributed.overflows import BAD, SCALE, STEPS

if TYPE_CHECKING:
    from collections.abc import Callable

    Seen = dict[str, Any]
    Group = Callable[[int], list[Seen]]

pytestmark = pytest.mark.distributed

FUSED = [
    f"{name}, {mode} mode"
    for name in ("fused, cut unlike", "two fused, cut unlike", "fused stages")
    for mode in ("host", "device")
]
BY_THE_SCALER = ["not fused, cut alike", "not fused, sharded scaler"]
REFUSED = ["not fused, cut unlike", "not fused, stages"]


@pytest.mark.parametrize("case", FUSED + BY_THE_SCALER)
def test_no_rank_takes_the_step_and_every_scaler_backs_off(group: Group, case: str) -> None:
    for seen in (rank["overflows"][case] for rank in group(2)):
        moved = [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in zip(seen["weights"], seen["weights"][1:], strict=False)
        ]
        assert moved == [step != BAD for step in range(1, STEPS)]
        assert seen["scale"] == SCALE / 2
        assert seen["updates"] == STEPS - 1


@pytest.mark.parametrize("case", FUSED)
def test_the_skip_is_the_scalers_on_every_rank_and_no_strike_for_the_guard(
    group: Group, case: str
) -> None:
    for seen in (rank["overflows"][case] for rank in group(2)):
        assert seen["events"] == ["scaler-skip"]
        assert seen["in a row"] == {"in_a_row": 0, "total": 0}


@pytest.mark.parametrize("case", FUSED + BY_THE_SCALER)
def test_all_ranks_see_the_same_norms(group: Group, case: str) -> None:
    first, second = (rank["overflows"][case] for rank in group(2))
    assert_same(first["norms"], second["norms"])


@pytest.mark.parametrize("case", REFUSED)
def test_a_scaler_that_would_keep_one_rank_from_the_step_is_refused(
    group: Group, case: str
) -> None:
    for rank in group(2):
        assert "fused=True" in rank["overflows"][case]["refused"]
        assert "ShardedGradScaler" in rank["overflows"][case]["refused"]
