"""DTensors placed in every way on one mesh or several, measured by one session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stablekit
from stablekit import hookimpl
from stablekit.errors import PlacementError
from tests.distributed.chains import Collectives

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from stablekit import Step


WEIGHT = torch.arange(20.0).view(5, 4) / 10 - 1
GRAD = torch.arange(20.0).view(5, 4).flip(0) / 7 - 1


def meshes_and_places(world: int) -> list[tuple[tuple[int, ...], list[Placement]]]:
    """Return mesh shapes with placements of a [5, 4] tensor."""
    from torch.distributed.tensor.placement_types import _StridedShard

    flat: list[list[Placement]] = [[Shard(0)], [Shard(1)], [Replicate()]]
    square: list[list[Placement]] = [
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=world // 2), Shard(0)],
        [Replicate(), Replicate()],
    ]
    return [
        *(((world,), places) for places in flat),
        *(((2, world // 2), places) for places in square),
    ]


class Measure:
    """Reads everything there is to read."""

    name = "measure"
    needs = ("unit_norms", "weight_unit_norms")

    def __init__(self) -> None:
        """Wait for the step."""
        self.seen: dict[str, Any] = {}

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Measure, scale each row by its number, measure again."""
        gradients = step.gradients
        units = gradients.unit_norms()
        self.seen = {
            "norms": gradients.norms(),
            "units": units,
            "weights": gradients.weight_unit_norms(),
        }
        gradients.scale_units_([torch.arange(1.0, 1 + unit.numel()) for unit in units])
        self.seen["scaled"] = gradients.norms()

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Read what costs another reduction."""
        self.seen["largest"] = step.gradients.amaxes()


def placements(rank: int, world: int) -> dict[str, Any]:
    """Measure tensors of every placement in one session; then what must be refused."""
    weight, grad = WEIGHT, GRAD
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    params = [nn.Parameter(weight.clone())]
    params[0].grad = grad.clone()
    for shape, places in meshes_and_places(world):
        mesh = meshes.setdefault(shape, init_device_mesh("cpu", shape))
        params.append(nn.Parameter(distribute_tensor(weight, mesh, places, src_data_rank=None)))
        params[-1].grad = distribute_tensor(grad.clone(), mesh, places, src_data_rank=None)
    plugin = Measure()
    optimizer = torch.optim.SGD(params, lr=0.0)
    stablekit.attach(optimizer, plugin)
    with Collectives() as collectives:
        optimizer.step()
    flat = meshes[(world,)]
    return {
        **plugin.seen,
        "collectives": dict(collectives.seen),
        "grads": [p.grad.full_tensor() for p in params if isinstance(p.grad, DTensor)],
        "partial": _partial(flat, weight, grad, world),
        "nan": _nan_on_one_rank(flat, weight, grad, rank),
        "one loss": _loss_on_one_rank(flat, weight, grad, rank),
        "whole nan": _bad_on_one_rank(flat, weight, grad, rank, torch.nan),
        "whole inf": _bad_on_one_rank(flat, weight, grad, rank, torch.inf),
        "plain": _refusal(flat, weight, grad),
        "other mesh": _refusal(
            flat,
            weight,
            distribute_tensor(grad.clone(), meshes[(2, world // 2)], [Shard(0), Replicate()]),
        ),
    }


def _sharded(mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor | None) -> nn.Parameter:
    param = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
    if grad is not None:
        param.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)], src_data_rank=None)
    return param


def _partial(
    mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor, world: int
) -> dict[str, float]:
    """A gradient whose sum over ranks is pending, of a replicated and of a sharded parameter."""
    params = [
        nn.Parameter(distribute_tensor(weight, mesh, [place], src_data_rank=None))
        for place in (Replicate(), Shard(0))
    ]
    for param in params:
        param.grad = DTensor.from_local(grad / world, mesh, [Partial()], run_check=False)
    optimizer = torch.optim.SGD(params, lr=0.0)
    session = stablekit.attach(optimizer, "global-norm")
    optimizer.step()
    return session.metrics()


def _nan_on_one_rank(
    mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor, rank: int
) -> list[float]:
    param = _sharded(mesh, weight, grad)
    assert isinstance(param.grad, DTensor)
    if rank == 1:
        param.grad.to_local().fill_(torch.nan)
    plugin, optimizer = Measure(), torch.optim.SGD([param], lr=0.0)
    stablekit.attach(optimizer, plugin)
    optimizer.step()
    return [plugin.seen["largest"].item(), plugin.seen["norms"].item()]


def _bad_on_one_rank(
    mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor, rank: int, value: float
) -> dict[str, Any]:
    """A tensor that is whole on every rank, beside one that is not, goes bad on the second."""
    plain = nn.Parameter(weight.clone())
    plain.grad = grad.clone()
    if rank == 1:
        plain.grad[0, 0] = value
    optimizer = torch.optim.SGD([plain, _sharded(mesh, weight, grad)], lr=0.0, foreach=False)
    session = stablekit.attach(optimizer, "nonfinite-guard")
    optimizer.step()
    return {
        "norm": session.metrics()["grad_norm"],
        "skipped": session.skipped,
        "kinds": [event.kind for event in session.events],
        "culprits": list(session.events[0].tensors),
    }


def _loss_on_one_rank(
    mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor, rank: int
) -> dict[str, float]:
    optimizer = torch.optim.SGD([_sharded(mesh, weight, grad)], lr=0.0)
    session = stablekit.attach(optimizer, "global-norm")
    if rank == 0:
        session.observe(loss=3.0)
    optimizer.step()
    return session.metrics()


def _refusal(mesh: DeviceMesh, weight: torch.Tensor, grad: torch.Tensor) -> str:
    param = _sharded(mesh, weight, None)
    param.grad = grad
    optimizer = torch.optim.SGD([param], lr=0.0)
    stablekit.attach(optimizer, "global-norm")
    try:
        optimizer.step()
    except PlacementError as error:
        return str(error)
    return "not refused"
