"""One rank of two that trains with LogitClip, error norms and gradient penalty: RANK FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stablekit
from stablekit_logits import ErrorNormTruncation, GradientPenalty, LogitClip
from tests.logits.models import Speaker, inputs_of, words
from tests.logits.small import classifier, samples

WORLD, STEPS = 2, 3
KINDS = ("clip", "ent", "penalty")


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def train(
    kind: str,
    plugin: Any,  # noqa: ANN401 - any of the three
    rank: int | None,
) -> tuple[list[Tensor], dict[str, float]]:
    """Train a rank on its part of each batch, or (None) one process on the whole of it."""
    makers: dict[str, Any] = {"clip": classifier, "ent": Speaker, "penalty": critic}
    model = makers[kind]()
    call: Any = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = stablekit.attach(optimizer, plugin, model=call)
    world = 1 if rank is None else WORLD
    for number in range(STEPS):
        optimizer.zero_grad()
        if kind == "ent":
            labels = words(number, rows=4, ignored=3)
            items = (labels[:, 1:] != -100).sum()
            part = labels.chunk(world)[rank or 0]
            # As Trainer does: divided by the words of all ranks, times the number of ranks.
            loss = call(inputs_of(part), part, num_items_in_batch=items) * world
        else:
            x, y = (one.chunk(world)[rank or 0] for one in samples(number))
            if kind == "clip":
                loss = nn.functional.cross_entropy(call(x), y)
            else:
                loss = call(x + 1).mean() - call(x).mean()
        loss.backward()
        optimizer.step()
    metrics = session.metrics()
    session.detach()
    return [param.detach() for param in model.parameters()], metrics


def plugin_of(kind: str) -> Any:  # noqa: ANN401 - any of the three
    """Return what is attached."""
    if kind == "clip":
        return LogitClip(1.0, on="head")
    if kind == "ent":
        return ErrorNormTruncation(1.2, divisor="kept", warmup_steps=1)
    return GradientPenalty(2.0)


def main() -> None:
    """Train every kind in one process group and save what came out."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    torch.save({kind: train(kind, plugin_of(kind), rank) for kind in KINDS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
