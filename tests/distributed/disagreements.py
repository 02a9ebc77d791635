"""Ranks that attached different things, or not at all, meet before their first step."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import stablekit
from stablekit import _agreement
from stablekit.errors import AttachError
from tests.distributed.chains import Collectives, LossReader
from tests.distributed.engines import mesh_of

if TYPE_CHECKING:
    from collections.abc import Iterator

Spec = tuple[list[Any], dict[str, Any]]
ALIKE = "nothing differs"


def disagreements(rank: int, world: int) -> dict[str, str]:
    """Return what the first step of this rank said, by what the last rank has of its own."""
    is_odd = rank == world - 1
    usual: list[Any] = ["nonfinite-guard", "zclip"]
    cases: dict[str, tuple[Spec, Spec]] = {
        ALIKE: ((usual, {}), (usual, {})),
        "plugins": ((usual, {}), (["nonfinite-guard"], {})),
        "order": ((usual, {}), (usual[::-1], {})),
        "setting": ((usual, {}), (["nonfinite-guard", "zclip:z_thresh=3.0"], {})),
        "class": ((["agc"], {}), (["zclip:name=agc"], {})),
        "restriction": (
            (["agc"], {}),
            ([stablekit.only("agc", include="*.0*")], {}),
        ),
        "log_every": ((usual, {}), (usual, {"log_every": 5})),
        "dry_run": ((usual, {}), (usual, {"dry_run": True})),
        "device_mode": ((usual, {}), (usual, {"device_mode": True})),
        "reduce_groups": ((usual, {}), (usual, {"reduce_groups": [dist.group.WORLD]})),
    }
    said = {name: _first_step(*specs[is_odd]) for name, specs in cases.items()}
    said["sharded"] = _first_step(*cases["plugins"][is_odd], sharded=True)
    said["parameters"] = _first_step(usual, {}, shapes=[(4,)] * (2 if is_odd else 3))
    said["shapes"] = _first_step(usual, {}, shapes=[(4,), (5 if is_odd else 3,)])
    return said


def absences(rank: int, world: int) -> dict[str, str]:
    """Return what the first rank says of others that come late, and what they say then."""
    return {
        name: _late(rank, world, sharded=sharded)
        for name, sharded in (("copies", False), ("shards", True))
    }


def strangers(rank: int, world: int) -> dict[str, str]:
    """Return what ranks say that train another model than the other half of the ranks."""
    mesh = mesh_of(2, world // 2, names=("team", "cut"))["cut"]
    team = rank // (world // 2)
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None))
    return {"said": _first_step([["zclip"], ["autoclip"]][team], {}, params=[param])}


def lonely_losses(rank: int, world: int) -> dict[str, Any]:
    """Return the losses that a plugin reads where only the last rank observes any."""
    seen: dict[str, Any] = {}
    for mode in (False, True):
        plugin, params = LossReader(), _params([(4,)])
        session = stablekit.attach(torch.optim.SGD(params), plugin, device_mode=mode, log_every=1)
        told = []
        for step in range(3):
            if rank == world - 1 and step < 2:
                session.observe(loss=3.0 + step)
            session.optimizers[0].step()
            told.append(session.metrics().get("loss-reader/loss"))
        seen["device" if mode else "host"] = told
    return seen


def _first_step(
    plugins: list[Any],
    options: dict[str, Any],
    *,
    sharded: bool = False,
    shapes: list[tuple[int, ...]] | None = None,
    params: list[nn.Parameter] | None = None,
) -> str:
    """Return what was raised or warned of in the first step, which issues its own collectives."""
    params = params or _params(shapes or [(4,), (3,)], sharded=sharded)
    optimizer = torch.optim.SGD(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    session = stablekit.attach(optimizer, *plugins, **options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            optimizer.step()
        except AttachError as error:
            return f"{type(error).__name__}: {error}"
    with Collectives() as later:
        optimizer.step()
    assert sum(later.seen.values()) == len(session.current_layout()[0].spans) + len(
        session.reduce_groups
    )
    return "; ".join(str(one.message) for one in warned)


def _late(rank: int, world: int, *, sharded: bool) -> str:
    said = ""
    with _patience(alone=0.5, shared=1.0):
        if rank == 0:
            said = _first_step(["zclip"], {}, sharded=sharded and world > 1)
    dist.barrier()
    if rank != 0:  # so that the next session has the same number everywhere
        said = _first_step(["zclip"], {})
    dist.barrier()
    return said


@contextmanager
def _patience(*, alone: float, shared: float) -> Iterator[None]:
    usual = _agreement.SECONDS_ALONE, _agreement.SECONDS
    _agreement.SECONDS_ALONE, _agreement.SECONDS = alone, shared
    try:
        yield
    finally:
        _agreement.SECONDS_ALONE, _agreement.SECONDS = usual


def _params(shapes: list[tuple[int, ...]], *, sharded: bool = False) -> list[nn.Parameter]:
    whole = [torch.ones(shape) for shape in shapes]
    if sharded:
        mesh = mesh_of(dist.get_world_size())
        whole = [distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for one in whole]
    return [nn.Parameter(one) for one in whole]
