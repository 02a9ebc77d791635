"""The same training runs in one process and in several; what was seen comes back as plain data."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import stablekit
from tests.distributed.chains import Collectives, Probe
from tests.distributed.engines import build, full, snapshot
from tests.distributed.model import BAD_SHARD, COUNTED, HALF_WAY, STEPS, losses_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.distributed.chains import Chain

    Seen = dict[str, Any]


class Run(NamedTuple):
    """One way to train."""

    engine: str
    """one, ddp, fsdp2 (rows), columns, hsdp."""
    faults: bool = True
    """A NaN batch on one rank, and a NaN in one shard."""
    missing: bool = False
    """In the last step the first rank has no gradient of the first tensor, cut by columns."""
    counted: bool = False
    """Count the collectives of four steps, the last two of them with a loss; look at no norms."""
    saved: bool = False
    """Keep the whole state half way."""
    device_mode: bool | None = None
    """As for attach."""
    dtype: torch.dtype = torch.float32
    """Of parameters and data. In float64 what differs is not blown up by training itself."""


class Trainee(NamedTuple):
    """A model with its optimizer, its session and what was seen of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    session: stablekit.Session | None
    probe: Probe
    seen: Seen


def train(
    run: Run, chosen: Mapping[str, Chain], *, rank: int = 0, world: int = 1
) -> dict[str, Seen]:
    """Train a model with each chain; ``world`` is the number of data shards for engine "one"."""
    fleet, trainees = _set_up(run, chosen)
    for step in range(COUNTED) if run.counted else range(STEPS):
        if step == HALF_WAY and run.saved:
            for one in trainees:
                one.seen["half way"] = snapshot(one.model, one.optimizer)
        _one_step(run, fleet, trainees, step, rank=rank, world=world)
    return {name: _result(one) for name, one in zip(chosen, trainees, strict=True)}


def resume(
    run: Run, chosen: Mapping[str, Chain], half_way: Mapping[str, Seen], *, world: int
) -> dict[str, Seen]:
    """Go on in one process from what several had saved."""
    fleet, trainees = _set_up(run, chosen)
    for name, one in zip(chosen, trainees, strict=True):
        one.model.load_state_dict(half_way[name]["model"])
        one.optimizer.load_state_dict(half_way[name]["optimizer"])
    for step in range(HALF_WAY, STEPS):
        _one_step(run, fleet, trainees, step, rank=0, world=world)
    return {name: _result(one) for name, one in zip(chosen, trainees, strict=True)}


def _set_up(run: Run, chosen: Mapping[str, Chain]) -> tuple[nn.Module, list[Trainee]]:
    fleet, models, optimizers = build(run.engine, len(chosen), run.dtype)
    trainees = []
    for model, optimizer, chain in zip(models, optimizers, chosen.values(), strict=True):
        probe = Probe(largest=False)
        plugins = chain() if run.counted else [*chain(), probe]
        session = None
        if plugins:
            session = stablekit.attach(
                optimizer, *plugins, model=model, device_mode=run.device_mode, log_every=1
            )
        seen: Seen = {"metrics": [], "collectives": []}
        trainees.append(Trainee(model, optimizer, session, probe, seen))
    return fleet, trainees


def _one_step(
    run: Run, fleet: nn.Module, trainees: list[Trainee], step: int, *, rank: int, world: int
) -> None:
    """Make all gradients in one backward pass; then every optimizer steps."""
    fleet.zero_grad()
    losses = _backward(run, fleet, step, rank=rank, world=world)
    for one, own in zip(trainees, losses, strict=True):
        weight = first_weight(one.model)
        if run.faults and step == BAD_SHARD:
            spoil(weight)
        if run.missing and step == STEPS - 1:
            lose(run.engine, weight, rank=rank, world=world)
        if one.session is not None and (not run.counted or step >= COUNTED // 2):
            for loss in own:
                one.session.observe(loss=loss)
        if run.counted:
            with Collectives() as collectives:
                one.optimizer.step()
            one.seen["collectives"].append(dict(collectives.seen))
        else:
            one.optimizer.step()
        if one.session is not None:
            one.seen["metrics"].append(one.session.metrics())


def _backward(
    run: Run, fleet: nn.Module, step: int, *, rank: int, world: int
) -> list[list[Tensor]]:
    """Make gradients averaged over ranks; in one process as DDP would, batch by batch.

    Returns:
        For each model the losses that this process has seen.
    """
    if run.engine != "one":
        losses = losses_of(fleet, step, rank, world, faults=run.faults)
        torch.autograd.backward(losses)
        return [[loss.detach()] for loss in losses]
    params = list(fleet.parameters())
    total: list[Tensor | None] = [None] * len(params)
    by_shard = []
    for shard in range(world):
        fleet.zero_grad()
        losses = losses_of(fleet, step, shard, world, faults=run.faults)
        torch.autograd.backward(losses)
        by_shard.append([loss.detach() for loss in losses])
        for i, param in enumerate(params):
            if param.grad is not None:
                part, before = param.grad / world, total[i]
                total[i] = part if before is None else before + part
    for param, grad in zip(params, total, strict=True):
        param.grad = grad
    return [list(own) for own in zip(*by_shard, strict=True)]


def _result(one: Trainee) -> Seen:
    weights = [full(param.detach()).clone() for param in one.model.parameters()]
    seen = {**one.seen, "probe": one.probe.seen, "weights": weights}
    if one.session is not None:
        seen["state"] = one.session.state_dict()
        plugins = one.session.plugins.items()
        seen["files"] = [name for name, plugin in plugins if _has_written(plugin)]
    return seen


def _has_written(plugin: object) -> bool:
    """Tell whether a plugin that has a path left something there."""
    for attribute in ("path", "log_dir"):
        place = getattr(plugin, attribute, None)
        if isinstance(place, (str, os.PathLike)) and os.path.exists(place):
            return os.path.isdir(place) or os.path.getsize(place) > 0
    return False


def first_weight(model: nn.Module) -> nn.Parameter:
    """Return the [5, 8] weight."""
    return next(p for name, p in model.named_parameters() if name.endswith("first.weight"))


def spoil(param: nn.Parameter) -> None:
    """Put NaN into the last row, on the rank that holds it."""
    grad = param.grad
    assert grad is not None
    held = grad.to_local() if isinstance(grad, DTensor) else grad
    is_holder = not isinstance(grad, DTensor) or grad.device_mesh.get_local_rank(-1) == (
        grad.device_mesh.size(-1) - 1 if grad.placements[-1].is_shard(1) else _holder(grad)
    )
    if is_holder:
        held[-1, 0] = math.nan


def lose(engine: str, param: nn.Parameter, *, rank: int, world: int) -> None:
    """Drop the gradient of the first rank; in one process its columns are zero."""
    if engine == "one":
        assert param.grad is not None
        param.grad[:, : 8 // world] = 0
    elif rank == 0:
        param.grad = None


def _holder(grad: DTensor) -> int:
    """Return which part of the last mesh dim holds the last of 5 rows."""
    return len(torch.arange(5).chunk(grad.device_mesh.size(-1))) - 1
