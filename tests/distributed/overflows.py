"""An overflow of the loss scale that only one rank can see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import stablekit
from stablekit.errors import AttachError
from tests.distributed.engines import full, mesh_of

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

SCALE, STEPS, BAD = 8.0, 4, 1
GRAD = torch.arange(12.0).view(4, 3) / 10 + 0.1


def overflows(rank: int, world: int) -> dict[str, Any]:
    """Train with an infinite element on the last rank in step BAD, in every way there is."""
    mixed: list[Placement] = [Replicate(), Shard(0)]
    alike: list[Placement] = [Shard(0), Shard(0)]
    return {
        **{
            f"{name}, {'device' if mode else 'host'} mode": _train(
                rank, world, places, fused=True, device_mode=mode, apart=apart
            )
            for mode in (False, True)
            for name, places, apart in (
                ("fused, cut unlike", mixed, False),
                ("two fused, cut unlike", mixed, True),
                ("fused stages", None, False),
            )
        },
        "not fused, cut alike": _train(rank, world, alike, fused=False),
        "not fused, sharded scaler": _train(rank, world, mixed, fused=False, sharded=True),
        "not fused, cut unlike": _train(rank, world, mixed, fused=False),
        "not fused, stages": _train(rank, world, None, fused=False),
    }


def _train(
    rank: int,
    world: int,
    places: list[Placement] | None,
    *,
    fused: bool,
    device_mode: bool = False,
    apart: bool = False,
    sharded: bool = False,
) -> dict[str, Any]:
    """Return what happened; without places each rank has parameters of its own."""
    params = [_parameter(place) for place in places or (None, None)]
    groups = [[param] for param in params] if apart else [params]
    optimizers = [torch.optim.AdamW(group, lr=0.1, fused=fused) for group in groups]
    session = stablekit.attach(
        optimizers,
        "nonfinite-guard",
        "global-norm",
        device_mode=device_mode,
        log_every=1,
        reduce_groups={"*": dist.group.WORLD} if places is None else None,
    )
    scaler = ShardedGradScaler("cpu", SCALE) if sharded else GradScaler("cpu", SCALE)
    scaler.scale(torch.ones(()))
    weights, norms = [], []
    for step in range(STEPS):
        for param in params:
            _give(param, is_bad=step == BAD and rank == world - 1 and param is params[-1])
        try:
            _step(scaler, optimizers)
        except AttachError as error:
            return {"refused": str(error)}
        norms.append(session.metrics().get("grad_norm"))
        weights.append([full(param.detach()).clone() for param in params])
    events = [event.kind for event in session.events]
    return {
        "weights": weights,
        "norms": norms,
        "scale": scaler.get_scale(),
        "events": events,
        "updates": session.updates,
        "in a row": session.state_dict()["plugins"]["nonfinite-guard"]["state"],
    }


def _parameter(place: Placement | None) -> nn.Parameter:
    weight = torch.ones(4, 3)
    if place is None:
        return nn.Parameter(weight)
    mesh = mesh_of(dist.get_world_size())
    return nn.Parameter(distribute_tensor(weight, mesh, [place], src_data_rank=None))


def _give(param: nn.Parameter, *, is_bad: bool) -> None:
    """Give a parameter its scaled gradient."""
    grad: Tensor = GRAD * SCALE
    if isinstance(param, DTensor):
        grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
    held = grad.to_local() if isinstance(grad, DTensor) else grad
    if is_bad:
        held[0, 0] = torch.inf
    param.grad = grad


def _step(scaler: GradScaler, optimizers: list[torch.optim.AdamW]) -> None:
    if len(optimizers) > 1:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
