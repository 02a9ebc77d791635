"""Under DDP loss plugins train and record on two ranks what one process does on all batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logits.two_ranks import STEPS, WORLD, train

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two processes once and return what each of them saw."""
    folder = tmp_path_factory.mktemp("ranks")
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.logits.two_ranks", str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


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
