"""Under DDP and FSDP2 monitors record on every rank what one process records of all batches."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.monitors.two_ranks import BAD, KINDS, LAST, STEPS, train

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two processes once and return what each of them saw."""
    folder = tmp_path_factory.mktemp("ranks")
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.monitors.two_ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
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


@functools.cache
def single(*, missing: bool) -> dict[str, Any]:
    """Train on all batches in this process."""
    return train("one", 0, missing=missing)


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if "/" in key}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_one_process_on_all_batches(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    alone = single(missing=kind == "missing")
    for seen in ranks:
        for step in range(STEPS):
            found, expected = (own(run["metrics"][step]) for run in (seen[kind], alone))
            if kind == "missing" and step == LAST:  # where there is no gradient nothing moves
                expected.update({k: v for k, v in found.items() if "/ratio" in k})
            assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
            assert len(found) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_on_every_bit(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (seen[kind] for seen in ranks)
    assert repr(first["events"]) == repr(second["events"])
    assert repr([own(m) for m in first["metrics"]]) == repr([own(m) for m in second["metrics"]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_that_failed_on_one_rank_is_named_on_all(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    for seen in ranks:
        told = [event for event in seen[kind]["events"] if event[0] == "nonfinite-activation"]
        expected = {"module": "head", "value": "nan", "forward_pass": 0}
        assert told == [("nonfinite-activation", BAD + 1, expected)]
