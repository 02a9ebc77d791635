"""Two ranks of which the second leaves in mid-run: RANK FOLDER HOW WHAT.

HOW is "dies" or "stalls"; WHAT is "norms" for sharded parameters, "loss" for a loss that is read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import stablekit
from stablekit.errors import PluginError
from tests.distributed.chains import LossReader
from tests.distributed.engines import mesh_of

PATIENCE = 3.0
LAST = 2


def main(rank: int, folder: Path, how: str, what: str) -> None:
    """Step until the other rank is gone; the first rank writes down how that ended."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    weight = torch.ones(4)
    if what == "norms":
        weight = distribute_tensor(weight, mesh_of(2), [Shard(0)], src_data_rank=None)
    param = nn.Parameter(weight)
    optimizer = torch.optim.SGD([param], lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard", "zclip", LossReader())
    step, start = 0, time.monotonic()
    try:
        for step in range(LAST + 2):
            if rank == 1 and step == LAST:
                _leave(how, folder)
            param.grad = torch.ones_like(param)
            session.observe(loss=1.0)
            start = time.monotonic()
            optimizer.step()
    except (RuntimeError, PluginError) as error:
        told = {
            "step": step,
            "seconds": time.monotonic() - start,
            "kind": type(error).__name__,
            "cause": type(error.__cause__).__name__,
            "message": str(error),
        }
        (folder / "told.json").write_text(json.dumps(told))
    os._exit(0)  # the group cannot be destroyed in order any more


def _leave(how: str, folder: Path) -> None:
    if how == "stalls":
        while not (folder / "told.json").exists():
            time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
