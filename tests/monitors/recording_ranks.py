"""One of two ranks of a sharded run that is recorded: ``RANK FOLDER``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import stablekit
from stablekit_monitors import JSONLines, Recorder, TensorBoard, Tracker


class Rows:
    """A tracker that counts."""

    count = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.count += 1


def train(model: nn.Module, rank: int, folder: Path, *, steps: int = 4) -> None:
    """Train, with NaN in the shards of one rank in the third step; each rank has its own paths."""
    rows = Rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = [
        "nonfinite-guard",
        Recorder(folder / f"run-{rank}"),
        JSONLines(folder / f"lines-{rank}.jsonl"),
        TensorBoard(folder / f"board-{rank}"),
        Tracker(rows if rank == 0 else None),
    ]
    session = stablekit.attach(optimizer, *plugins, model=model)
    for step in range(1, steps + 1):
        set_gradients(model, step, spoiled=rank == 1 and step == 3)
        session.observe(loss=float(step + 2 * rank))
        optimizer.step()
    session.detach()
    assert rows.count == (steps if rank == 0 else 0)


def set_gradients(model: nn.Module, step: int, *, spoiled: bool) -> None:
    """Give whole tensor number i the gradient i + step everywhere."""
    for i, param in enumerate(model.parameters()):
        grad = torch.full_like(param, float(i + step))
        if spoiled and isinstance(grad, DTensor):
            grad.to_local().fill_(torch.nan)
        param.grad = grad


def main(rank: int, folder: Path) -> None:
    """Record one run of plain tensors and one of sharded ones."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        plain, sharded = nn.Linear(4, 6), nn.Linear(4, 6)
        fully_shard(sharded)
        train(plain, rank, folder / "plain")
        train(sharded, rank, folder / "sharded")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
