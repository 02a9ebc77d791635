"""One rank of a group that runs every case and writes down what it saw: RANK WORLD FOLDER."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.placements import placements
from tests.distributed.work import Run, chains, counted_chains, train

RUNS = {
    1: {"fsdp2": Run("fsdp2")},
    2: {
        "ddp": Run("ddp"),
        "fsdp2": Run("fsdp2"),
        "columns": Run("columns", missing=True),
        "counted ddp": Run("ddp", faults=False, counted=True, loss=False),
        "counted ddp loss": Run("ddp", faults=False, counted=True),
        "counted fsdp2": Run("fsdp2", faults=False, counted=True, loss=False),
        "counted fsdp2 loss": Run("fsdp2", faults=False, counted=True),
    },
    4: {"hsdp": Run("hsdp"), "fsdp2": Run("fsdp2")},
}
EVERYTHING = "everything"
CUT_BY_COLUMNS = ("agc", "clip-value after agc", "quantile-clip of each tensor", EVERYTHING)
"""Chains that see more than the global norm, which is the same however tensors are cut."""


def cases(rank: int, world: int) -> dict[str, Any]:
    """Run everything this size of group is for."""
    seen: dict[str, Any] = {}
    for run, how in RUNS[world].items():
        made = counted_chains() if how.counted else chains()
        seen[run] = {
            name: train(how, chain(), rank=rank, world=world)
            for name, chain in made.items()
            if name == EVERYTHING or (world == 2 and (run != "columns" or name in CUT_BY_COLUMNS))
        }
    if world > 1:
        seen["placements"] = placements(rank, world)
    return seen


def main(rank: int, world: int, folder: Path) -> None:
    """Join the group and leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(cases(rank, world), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
