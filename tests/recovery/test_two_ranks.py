"""Two ranks go back together, each with its own shards, whatever breaks on one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.oracles import equal
from tests.recovery.two_ranks import CASES, GOOD, LATER

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what both ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.recovery.two_ranks", str(r), str(folder)],
            cwd=ROOT,
            env={**os.environ, **QUIET},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("engine", "fault", "mode"), CASES)
def test_both_ranks_are_where_a_run_without_the_fault_is(
    ranks: list[dict[str, Any]], engine: str, fault: str, mode: str
) -> None:
    first, second = (seen[f"{engine} {fault} {mode}"] for seen in ranks)
    assert first["event"] == second["event"]
    assert GOOD < first["event"]["step"] <= GOOD + 4
    assert first["event"]["data"]["batches"][-1] >= 100
    for seen in (first, second):
        assert equal(seen["went back to"], seen["should have gone back to"])
        assert equal(seen["end"], seen["should have ended"])
        assert equal(seen["end"], first["end"])
        assert seen["updates"][0] == seen["updates"][1]
    assert first["updates"][0] == first["event"]["data"]["to_update"] + LATER


def test_each_rank_keeps_its_own_shards_only(ranks: list[dict[str, Any]]) -> None:
    sizes = [seen["memory"] for seen in ranks]
    assert all(size["bytes"] == size["expected"] for size in sizes)
    assert sizes[0]["bytes"] > sizes[1]["bytes"]


def test_a_step_costs_no_collective_more_and_a_snapshot_one(ranks: list[dict[str, Any]]) -> None:
    assert [seen["counted"] for seen in ranks] == [[2, 1, 1, 1, 2, 1, 1, 1]] * 2


def test_both_ranks_escalate_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = (seen["escalated"] for seen in ranks)
    assert first == second
    kinds = [event["kind"] for event in first]
    assert list(dict.fromkeys(kinds)) == ["skip", "level-shift", "lr-backoff", "rollback"]
