"""Process groups of this machine: each size is started once and runs every case."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Seen = dict[str, Any]


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Seen]]:
    """Return what every rank of a group of some size saw."""
    known: dict[int, list[Seen] | str] = {}

    def of(world: int) -> list[Seen]:
        if world not in known:
            known[world] = _run(world, tmp_path_factory.mktemp(f"world{world}"))
        seen = known[world]
        if isinstance(seen, str):
            pytest.fail(seen)
        return seen

    return of


def _run(world: int, folder: Path) -> list[Seen] | str:
    """Start the ranks and collect what they saw, or what they said when one failed."""
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(rank), str(world), str(folder)],
            env={**os.environ, **quiet},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=400)[1] for process in ranks]
    if any(process.returncode for process in ranks):
        return "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
