"""Starting a script of this folder as the ranks of one process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def saved_by_ranks(script: str, folder: Path, world: int) -> list[dict[str, Any]]:
    """Run ``tests.logits.<script> RANK FOLDER`` once a rank; return what each saved."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.logits.{script}", str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, **QUIET},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
