"""Under DDP loss plugins train and record on two ranks what one process does on all batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.logits.starting import saved_by_ranks
from tests.logits.two_ranks import STEPS, WORLD, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two processes once and return what each of them saw."""
    return saved_by_ranks("two_ranks", tmp_path_factory.mktemp("ranks"), WORLD)


def test_both_ranks_hold_the_same_weights_and_metrics(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert first["metrics"] == second["metrics"]


def test_they_are_those_of_one_process_on_all_batches(ranks: list[dict[str, Any]]) -> None:
    alone = train(*range(WORLD))
    torch.testing.assert_close(ranks[0]["weights"], alone["weights"])
    assert len(alone["metrics"]) == STEPS
    for found, expected in zip(ranks[0]["metrics"], alone["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
