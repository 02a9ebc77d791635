"""Of two processes one writes, and what it writes is about both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stablekit_monitors import read_run

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two ranks and return where they wrote."""
    path = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.monitors.recording_ranks", str(rank), str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return path


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_the_first_rank_records_the_norms_and_losses_of_all(folder: Path, kind: str) -> None:
    log = read_run(folder / kind / "run-0")
    assert log.steps.tolist() == [1, 2, 3, 4]
    assert log.header["processes"] == 2
    assert log.scalars["loss"].tolist() == [2.0, 3.0, 4.0, 5.0]  # of s and s + 2
    sizes = np.array([24, 6])
    expected = np.array([[step, step + 1] for step in range(1, 5)]) * np.sqrt(sizes)
    if kind == "sharded":
        expected[2] = np.nan
        assert log.ok.tolist() == [True, True, False, True]
        assert {event.step for event in log.events} == {3}
    np.testing.assert_allclose(log.norms, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_only_the_first_rank_writes(folder: Path, kind: str) -> None:
    names = sorted(path.name for path in (folder / kind).iterdir())
    assert names == ["board-0", "lines-0.jsonl", "run-0"]
