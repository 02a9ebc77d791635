"""One rank of a group that runs every case and writes down what it saw: RANK WORLD FOLDER."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.chains import CLIPPERS, CUT_BY_COLUMNS, EVERYTHING, chains, counted_chains
from tests.distributed.composed import composed
from tests.distributed.disagreements import absences, disagreements, lonely_losses, strangers
from tests.distributed.flat import flat
from tests.distributed.overflows import overflows
from tests.distributed.parallel import parallel
from tests.distributed.placements import placements
from tests.distributed.stages import experts, pipeline, pipeline_in_device_mode
from tests.distributed.training import Run, train

WIDE = torch.float64
RUNS = {
    1: {"ddp": Run("ddp", dtype=WIDE), "fsdp2": Run("fsdp2", dtype=WIDE)},
    2: {
        "ddp": Run("ddp"),
        "fsdp2": Run("fsdp2", saved=True, dtype=WIDE),
        "columns": Run("columns", missing=True, dtype=WIDE),
        "fsdp2, device mode": Run("fsdp2", device_mode=True),
        "ddp, device mode": Run("ddp", device_mode=True),
        "counted ddp": Run("ddp", faults=False, counted=True),
        "counted fsdp2": Run("fsdp2", faults=False, counted=True),
    },
    4: {
        "ddp": Run("ddp", dtype=WIDE),
        "fsdp2": Run("fsdp2", dtype=WIDE),
        "hsdp": Run("hsdp", dtype=WIDE),
    },
}
LIMITED = {
    "columns": (*CUT_BY_COLUMNS, EVERYTHING),
    "hsdp": (EVERYTHING,),
    "fsdp2, device mode": (CLIPPERS,),
    "ddp, device mode": (CLIPPERS,),
}
CASES = {
    2: [
        placements,
        disagreements,
        absences,
        lonely_losses,
        pipeline,
        pipeline_in_device_mode,
        experts,
        overflows,
        parallel,
        composed,
        flat,
    ],
    4: [placements, disagreements, strangers, lonely_losses, pipeline, experts, parallel],
}


def cases(rank: int, world: int) -> dict[str, Any]:
    """Run everything this size of group is for."""
    seen: dict[str, Any] = {}
    for name, run in RUNS[world].items():
        made = counted_chains() if run.counted else chains()
        chosen = {key: made[key] for key in LIMITED.get(name, made)}
        seen[name] = train(run, chosen, rank=rank, world=world)
    for case in CASES.get(world, []):
        seen[case.__name__] = case(rank, world)
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
