"""One rank of two that trains with every monitor, whole and sharded: RANK FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import stablekit
from stablekit_monitors import (
    ActivationMonitor,
    AttentionMonitor,
    ClippingBias,
    ContrastiveMonitor,
    LogitsMonitor,
    ResidualMonitor,
    UpdateMonitor,
)
from tests.monitors.watched import WIDTH, Transformer, words

WORLD = 2
STEPS = 4
BAD, LAST = 2, 3
KINDS = ("ddp", "rows", "columns", "missing")
"""How tensors are cut; "missing" is by columns, and a gradient is missing on the first rank."""


def monitors() -> list[Any]:
    """Return all of them, and a clipper for ClippingBias to look at."""
    split: dict[str, Any] = {"query": "blocks.*.attn.wq", "key": "blocks.*.attn.wk", "head_dim": 4}
    return [
        "nonfinite-guard",
        "global-norm:max_norm=0.5",
        UpdateMonitor(1, per_tensor=True),
        ClippingBias(5, every=1),
        ResidualMonitor(1),
        LogitsMonitor(1),
        AttentionMonitor(1, **split),
        AttentionMonitor(1, mode="exact", layers="blocks.*.attn", name="exact"),
        ContrastiveMonitor(1, first="first", second="second"),
        ActivationMonitor(),
    ]


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Return the loss of a rank's batch, NaN on the last rank in step BAD."""
    batch = words(10 * step + rank)
    logits = model(batch)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.roll(-1, 1).flatten())
    return loss * (1 + step)


def spoil(model: nn.Module, step: int, rank: int) -> Any:  # noqa: ANN401 - a handle or None
    """Make the head of the last rank's model put out NaN in step BAD."""
    if step != BAD or rank != WORLD - 1:
        return None
    head = next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "head")
    return head.register_forward_hook(
        lambda module, inputs, output: output * torch.nan, prepend=True
    )


def lose(model: Transformer, *, kind: str, rank: int) -> None:
    """Drop what the first rank holds of a gradient that is cut by columns."""
    weight: Any = model.blocks[0].mlp[0].weight  # type: ignore[index, union-attr]
    if kind == "one":
        assert weight.grad is not None
        weight.grad[:, : WIDTH // WORLD] = 0
    elif rank == 0:
        weight.grad = None


def train(kind: str, rank: int, *, missing: bool = False) -> dict[str, Any]:
    """Return what a run showed; "one" is a single process that takes the ranks' batches in turn."""
    model = Transformer()
    parallel: nn.Module = model
    if kind == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
    elif kind != "one":
        _shard(model, by_columns=kind != "rows")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    session = stablekit.attach(optimizer, *monitors(), model=parallel)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for which in range(WORLD) if kind == "one" else (rank,):
            handle = spoil(parallel, step, which)
            loss = loss_of(parallel, step, which) / (WORLD if kind == "one" else 1)
            torch.autograd.backward(loss)
            if handle is not None:
                handle.remove()
        if missing and step == LAST:
            lose(model, kind=kind, rank=rank)
        optimizer.step()
        seen.append(session.metrics())
    events = [(e.kind, e.step, dict(e.data)) for e in session.events if e.plugin]
    return {"metrics": seen, "events": events}


def _shard(model: Transformer, *, by_columns: bool) -> None:
    def place(param: nn.Parameter) -> Shard:
        return Shard(1 if by_columns and param.shape == (WIDTH, WIDTH) else 0)

    for block in model.blocks:
        fully_shard(block, shard_placement_fn=place)
    fully_shard(model, shard_placement_fn=place)


def main(rank: int, folder: Path) -> None:
    """Join the group and leave the results in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    seen = {kind: train(kind, rank, missing=kind == "missing") for kind in KINDS}
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
