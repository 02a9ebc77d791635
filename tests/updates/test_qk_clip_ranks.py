"""Two processes with different batches clip as one process does that sees both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.updates.clipped import KINDS
from tests.updates.qk_clip_ranks import BAD, ENGINES, PLACED, scaled, train

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
each_run = pytest.mark.parametrize("kind", KINDS)
each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two processes once and return what each of them saw."""
    folder = tmp_path_factory.mktemp("ranks")
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.updates.qk_clip_ranks", str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@each_run
@each_engine
def test_ranks_have_the_same_weights_bit_by_bit(
    ranks: list[dict[str, Any]], engine: str, kind: str
) -> None:
    ours, theirs = (rank[f"{engine} {kind}"] for rank in ranks)
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name])
    assert ours["metrics"] == theirs["metrics"]
    assert ours["events"] == theirs["events"]


@each_run
@each_engine
def test_they_come_to_what_one_process_comes_to(
    ranks: list[dict[str, Any]], engine: str, kind: str
) -> None:
    found, alone = ranks[0][f"{engine} {kind}"], train("one", kind, 0)
    assert [step["qk-clip/clipped"] for step in alone["metrics"] if "qk-clip/clipped" in step]
    assert max(step["qk-clip/clipped"] for step in alone["metrics"]) > 0
    assert alone["metrics"][BAD]["steps_skipped"] == 1
    for ours, theirs in zip(found["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert found["events"] == alone["events"]


def test_device_mode_clips_sharded_weights_alike(ranks: list[dict[str, Any]]) -> None:
    for name, weight in ranks[0]["rows exact"]["weights"].items():
        torch.testing.assert_close(ranks[0]["device"]["weights"][name], weight)


@pytest.mark.parametrize("cut", PLACED)
def test_heads_are_scaled_alike_however_a_weight_is_cut(
    ranks: list[dict[str, Any]], cut: str
) -> None:
    for name, tensor in scaled(None).items():
        assert torch.equal(ranks[1]["scaled"][cut][name], tensor), name
