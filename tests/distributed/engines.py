"""The forms a model takes to be trained by several processes, and back."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.model import Fleet

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build(
    engine: str, count: int, dtype: torch.dtype
) -> tuple[nn.Module, list[nn.Module], list[torch.optim.AdamW]]:
    """Return a fleet in the form an engine needs, its models and their optimizers."""
    fleet = Fleet(count).to(dtype)
    trained: nn.Module = fleet
    if engine == "ddp":
        trained = _data_parallel(fleet)
    elif engine != "one":
        _shard(fleet, engine)
    models: list[nn.Module] = list(fleet.models)
    return trained, models, [_optimizer(model) for model in models]


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return whole tensors, by the names and numbers that one process uses."""
    saved = optimizer.state_dict()
    state = {i: {k: full(v).clone() for k, v in s.items()} for i, s in saved["state"].items()}
    weights = {name: full(value).clone() for name, value in model.state_dict().items()}
    return {"model": weights, "optimizer": {**saved, "state": state}}


@functools.cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """Return a mesh over all ranks, made once."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)


def _data_parallel(fleet: Fleet) -> nn.Module:
    trained = DistributedDataParallel(fleet, find_unused_parameters=True)
    if dist.get_world_size() > 2:
        # torch compares annotations with classes; here they are strings.
        _average_in_order.__annotations__.clear()
        trained.register_comm_hook(None, _average_in_order)
    return trained


def _average_in_order(_: object, bucket: Any) -> torch.futures.Future[Tensor]:  # noqa: ANN401 - a GradBucket
    """Average in the order of ranks: only then can one process come to the same bits."""
    mine: Tensor = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    total = parts[0] / len(parts)
    for part in parts[1:]:
        total = total + part / len(parts)
    done.set_result(total)
    return done


def _shard(fleet: Fleet, engine: str) -> None:
    """Shard by rows ("fsdp2"), by columns where there are 8, or with copies ("hsdp")."""
    world = dist.get_world_size()
    mesh = mesh_of(2, world // 2, names=("copy", "cut")) if engine == "hsdp" else mesh_of(world)

    def place(param: nn.Parameter) -> Shard:
        return Shard(1 if engine == "columns" and param.shape[1:] == (8,) else 0)

    for model in fleet.models if engine != "fsdp2" else ():
        for layer in (model.first, model.last):
            fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(fleet, mesh=mesh, shard_placement_fn=place)
