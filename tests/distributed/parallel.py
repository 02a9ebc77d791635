"""A small model made parallel by torch's own functions, along one mesh dim or two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import stablekit
from tests.distributed.chains import Collectives, Probe
from tests.distributed.engines import full, mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STEPS, SPIKE, BAD = 7, 3, 5
CHAIN = ["nonfinite-guard", "zclip:warmup_steps=2", "agc:clipping=0.05", "adagc:warmup_steps=1"]
DATA_SHARDS = {
    "tp": 1,
    "tp, plain norms": 1,
    "hsdp": 4,
    "fsdp x tp": 2,
    "fsdp x tp, plain norms": 2,
}
"""How many batches each form sees in a step."""
WORLDS = {place: 4 if shards > 1 else 2 for place, shards in DATA_SHARDS.items()}


@final
class Block(nn.Module):
    """Norm, up, down, as in a transformer; the last rows do not divide evenly."""

    def __init__(self) -> None:
        """Make the same weights everywhere."""
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, t, 6] to the same."""
        inner: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + inner


@final
class Tower(nn.Module):
    """Two blocks and a head of three rows, which four ranks cannot share evenly."""

    def __init__(self) -> None:
        """Make the same weights everywhere."""
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, t, 6] to [n, t, 3]."""
        for block in self.blocks:
            x = block(x)
        said: Tensor = self.head(x)
        return said


def parallel(rank: int, world: int) -> dict[str, Any]:
    """Train in every form that this many ranks allow."""
    return {place: _train(place, rank, world) for place in WORLDS if WORLDS[place] == world}


def whole(shards: int) -> dict[str, Any]:
    """Train in one process, on the batches of so many data-parallel ranks."""
    model = Tower().double()
    run = _Run(model)
    for step in range(STEPS):
        model.zero_grad()
        losses = []
        for shard in range(shards):
            loss = _loss(model, step, shard)
            (loss / shards).backward()
            losses.append(loss.detach())
        run.step(step, losses)
    return run.seen()


def _train(place: str, rank: int, world: int) -> dict[str, Any]:
    model = Tower().double()
    if "tp" in place:
        tp = mesh_of(world) if place.startswith("tp") else _square(world)["tp"]
        _cut(model, tp, norms="plain" not in place)
    if place.startswith("fsdp"):
        for layer in (*model.blocks, model):
            fully_shard(layer, mesh=_square(world)["dp"])
    if place == "hsdp":
        for layer in (*model.blocks, model):
            fully_shard(layer, mesh=mesh_of(2, world // 2, names=("copy", "cut")))
    shard = rank * DATA_SHARDS[place] // world
    run = _Run(model)
    for step in range(STEPS):
        model.zero_grad()
        loss = _loss(model, step, shard)
        loss.backward()
        run.step(step, [full(loss.detach())])
    return run.seen()


def _square(world: int) -> DeviceMesh:
    return mesh_of(world // 2, 2, names=("dp", "tp"))


def _cut(model: Tower, mesh: DeviceMesh, *, norms: bool) -> None:
    """Apply tensor parallelism, with sequence-parallel norms or with norms left as they are."""
    plan: dict[str, Any] = {}
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.up"] = ColwiseParallel()
        plan[f"blocks.{i}.down"] = RowwiseParallel()
        if norms:
            plan[f"blocks.{i}.norm"] = SequenceParallel()
            plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=Shard(1))
            plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=Shard(1))
    if norms:
        plan["blocks.0"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


def _loss(model: nn.Module, step: int, shard: int) -> Tensor:
    make = torch.Generator().manual_seed(10 * step + shard)
    x = torch.randn(2, 4, 6, generator=make).double()
    y = torch.randn(2, 4, 3, generator=make).double()
    return nn.functional.mse_loss(model(x), y) * (50.0 if step == SPIKE else 1.0)


@final
class _Run:
    """A session on a model, and what was seen of it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        kinds: dict[Any, list[nn.Parameter]] = {}
        for param in model.parameters():  # torch steps tensors of one mesh together
            kinds.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(
                param
            )
        self._optimizer = torch.optim.AdamW([{"params": same} for same in kinds.values()], lr=0.02)
        self._probe = Probe()
        self._session = stablekit.attach(self._optimizer, *CHAIN, self._probe, model=model)
        self._collectives: list[int] = []

    def step(self, step: int, losses: list[Tensor]) -> None:
        grad = next(p.grad for n, p in self._model.named_parameters() if n == "blocks.1.up.weight")
        if step == BAD:
            _spoil(grad)
        for loss in losses:
            self._session.observe(loss=loss)
        with Collectives() as collectives:
            self._optimizer.step()
        self._collectives.append(sum(collectives.seen.values()))

    def seen(self) -> dict[str, Any]:
        names = list(self._session.current_layout()[0].names)
        weights = {name: full(p.detach()) for name, p in self._model.named_parameters()}
        return {
            "probe": self._probe.seen,
            "names": names,
            "weights": dict(sorted(weights.items())),
            "events": [event.as_dict() for event in self._session.events],
            "collectives": self._collectives,
        }


def _spoil(grad: Tensor | None) -> None:
    """Put a NaN into the part of the last rank, which has the last row."""
    assert grad is not None
    if not isinstance(grad, DTensor):
        grad[-1, -1] = math.nan
    elif dist.get_rank() == dist.get_world_size() - 1:
        grad.to_local()[-1, -1] = math.nan
