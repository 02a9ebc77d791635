"""Process groups of this machine: each size is started once and runs every case."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Seen = dict[str, Any]


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[int], list[Seen]]:
    """Return what every rank of a group of some size saw; workers of xdist share the groups."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    known: dict[int, list[Seen] | str] = {}

    def of(world: int) -> list[Seen]:
        if world not in known:
            folder = shared / f"world{world}"
            folder.mkdir(exist_ok=True)
            with FileLock(folder / "lock"):
                known[world] = _outcome(world, folder)
        seen = known[world]
        if isinstance(seen, str):
            pytest.fail(seen)
        return seen

    return of


def _outcome(world: int, folder: Path) -> list[Seen] | str:
    """Return what the ranks saw, starting them unless that was done before."""
    said = folder / "said"
    if not said.exists():
        said.write_text(_run(world, folder))
    if text := said.read_text():
        return text
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _run(world: int, folder: Path) -> str:
    """Start the ranks; return what they said if one failed."""
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
    return "\n".join(said) if any(process.returncode for process in ranks) else ""
