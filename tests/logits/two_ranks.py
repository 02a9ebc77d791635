"""One rank of two that trains a language model with loss plugins under DDP: RANK FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stablekit
from stablekit_logits import SoftCap, ZLoss
from tests.logits.models import Speaker, inputs_of, words

WORLD, STEPS = 2, 3


def labels_of(step: int, rank: int) -> Tensor:
    """Return the sentences of a rank; on the second one words are ignored."""
    return words(10 * step + rank, ignored=4 * rank)


def items_in(step: int) -> int:
    """Return how many words are predicted on all ranks together."""
    return sum(int((labels_of(step, rank)[:, 1:] != -100).sum()) for rank in range(WORLD))


def train(*ranks: int) -> dict[str, Any]:
    """Train on the batches of these ranks: on all in one process, on one as a rank of DDP."""
    model = Speaker()
    is_alone = len(ranks) == WORLD
    wrapped: nn.Module = model if is_alone else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, ZLoss(0.1), SoftCap(3.0), model=wrapped)
    metrics = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            labels = labels_of(step, rank)
            loss = wrapped(inputs_of(labels), labels, num_items_in_batch=items_in(step))
            # Divided by the words of all ranks; DDP divides by their number once more.
            (loss if is_alone else loss * WORLD).backward()
        optimizer.step()
        metrics.append({key: value for key, value in session.metrics().items() if "/" in key})
    return {"weights": [p.detach().clone() for p in model.parameters()], "metrics": metrics}


def main(rank: int, folder: Path) -> None:
    """Join the other rank and leave what was seen in a file."""
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    try:
        torch.save(train(rank), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
