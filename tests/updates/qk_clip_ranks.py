"""One of two ranks that clip the same model on different batches: ``RANK FOLDER``."""

from __future__ import annotations

import itertools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import stablekit
from stablekit_updates import QKClip
from stablekit_updates.qk_clip import scale_heads_
from tests.monitors.watched import WIDTH, words
from tests.updates.clipped import KINDS, loud

WORLD, STEPS, BAD = 2, 4, 2
ENGINES = ("ddp", "rows", "columns")
SHAPES = {"rows": (5, 3), "square": (6, 6), "vector": (5,)}
PLACED = ("rows", "columns", "copies")


def train(engine: str, kind: str, rank: int, *, device_mode: bool = False) -> dict[str, Any]:
    """Return what a run came to; "one" is a single process that takes the ranks' batches in turn.

    In step BAD the gradient of the last rank is NaN.
    """
    model = loud()
    parallel: nn.Module = model
    if engine == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
    elif engine != "one":
        _shard(model, by_columns=engine == "columns")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    chain = ["nonfinite-guard", QKClip(0.5, **KINDS[kind])]
    session = stablekit.attach(
        optimizer, *chain, model=parallel, device_mode=device_mode, log_every=1
    )
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for which in range(WORLD) if engine == "one" else (rank,):
            batch = words(10 * step + which)
            loss = nn.functional.cross_entropy(
                parallel(batch).flatten(0, 1), batch.roll(-1, 1).flatten()
            )
            loss = loss * (torch.nan if (step, which) == (BAD, WORLD - 1) else 1)
            (loss / (WORLD if engine == "one" else 1)).backward()
        optimizer.step()
        seen.append({k: v for k, v in session.metrics().items() if "qk-clip" in k or "skip" in k})
    weights = {name: whole(param.detach()).clone() for name, param in model.named_parameters()}
    events = [(event.kind, event.step, event.tensors) for event in session.events if event.plugin]
    return {"metrics": seen, "weights": weights, "events": events}


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(model: nn.Module, *, by_columns: bool) -> None:
    def place(param: nn.Parameter) -> Shard:
        return Shard(1 if by_columns and param.shape == (WIDTH, WIDTH) else 0)

    for block in model.blocks:  # type: ignore[union-attr]  # a list of modules
        fully_shard(block, shard_placement_fn=place)
    fully_shard(model, shard_placement_fn=place)


def scaled(cut: str | None) -> dict[str, Tensor]:
    """Return tensors of which parts were scaled, each in every way that is possible."""
    found = {}
    for (name, shape), is_offset in itertools.product(SHAPES.items(), (False, True)):
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for dim in range(len(shape)):
            tensor = made.clone()
            if cut is not None:
                place = {"rows": Shard(0), "columns": Shard(len(shape) - 1), "copies": Replicate()}
                tensor = distribute_tensor(tensor, init_device_mesh("cpu", (WORLD,)), [place[cut]])
            factors = torch.tensor([0.5, 3.0])
            start = shape[dim] % 2
            scale_heads_(tensor, factors, dim=dim, start=start, is_offset=is_offset)
            found[f"{name} {dim} {is_offset}"] = whole(tensor)
    return found


def main(rank: int, folder: Path) -> None:
    """Run every case and leave the results in a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        seen: dict[str, Any] = {f"{e} {k}": train(e, k, rank) for e in ENGINES for k in KINDS}
        seen["device"] = train("rows", "exact", rank, device_mode=True)
        seen["scaled"] = {cut: scaled(cut) for cut in PLACED}
        torch.save(seen, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
