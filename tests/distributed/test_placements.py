"""Tensors placed in any way are measured as the whole they are, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.distributed.placements import GRAD, WEIGHT, meshes_and_places

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("world", [2, 4])]

ROWS = torch.arange(1.0, 6.0)


def seen_in(group: Group, world: int) -> list[dict[str, Any]]:
    return [seen["placements"] for seen in group(world)]


def test_norms_of_every_placement_are_those_of_the_whole(group: Group, world: int) -> None:
    count = 1 + len(meshes_and_places(world))
    for seen in seen_in(group, world):
        torch.testing.assert_close(seen["norms"], GRAD.norm().expand(count))
        torch.testing.assert_close(seen["units"], [GRAD.norm(dim=1)] * count)
        torch.testing.assert_close(seen["weights"], [WEIGHT.norm(dim=1)] * count)


def test_factors_of_rows_reach_the_rows_wherever_they_are(group: Group, world: int) -> None:
    scaled = GRAD * ROWS[:, None]
    count = 1 + len(meshes_and_places(world))
    for seen in seen_in(group, world):
        torch.testing.assert_close(seen["scaled"], scaled.norm().expand(count))
        torch.testing.assert_close(seen["grads"], [scaled] * (count - 1))
        torch.testing.assert_close(seen["largest"], scaled.abs().max().expand(count))


def test_meshes_over_all_ranks_share_one_reduction(group: Group, world: int) -> None:
    for seen in seen_in(group, world):
        assert sum(seen["collectives"].values()) == 2  # norms, units, weights; largest elements


def test_pending_sums_are_carried_out_before_norms_are_read(group: Group, world: int) -> None:
    for seen in seen_in(group, world):
        assert seen["partial"]["grad_norm"] == pytest.approx(2**0.5 * GRAD.norm().item())


def test_nan_on_one_rank_is_nan_on_all(group: Group, world: int) -> None:
    for seen in seen_in(group, world):
        assert all(value != value for value in seen["nan"])


def test_a_loss_on_one_rank_only_is_the_mean_of_those_there_are(group: Group, world: int) -> None:
    for seen in seen_in(group, world):
        assert seen["one loss"]["loss"] == 3.0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_in_a_whole_tensor_of_one_rank_skips_the_step_on_all(
    group: Group, world: int, value: str
) -> None:
    for rank, seen in enumerate(seen_in(group, world)):
        found = seen[f"whole {value}"]
        assert found["norm"] == pytest.approx(float(value), nan_ok=True)
        assert found["skipped"] == 1
        assert found["kinds"] == ["nonfinite", "skip"]
        assert found["culprits"] == (["group0.0(5x4)"] if rank == 1 else [])


def test_a_gradient_that_is_not_on_the_mesh_of_its_parameter_is_refused(
    group: Group, world: int
) -> None:
    for seen in seen_in(group, world):
        assert "is a Tensor, but the parameter is a DTensor" in seen["plain"]
        assert "redistribute the gradient" in seen["other mesh"]
