"""stablekit together with what else is done to a model: compiled, checkpointed, accumulated."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import stablekit
from tests.distributed.engines import full, mesh_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

STEPS, MICRO, MAX_NORM = 4, 2, 0.3


class Way(NamedTuple):
    """How the model is treated."""

    engine: str = "fsdp2"
    compiled: str = ""
    checkpointed: str = ""
    accumulated: bool = False
    sharding: dict[str, Any] = {}  # noqa: RUF012 - never written to


WAYS = {
    "ddp": Way("ddp"),
    "ddp, no_sync": Way("ddp", accumulated=True),
    "ddp, compiled eagerly": Way("ddp", compiled="eager"),
    "ddp, compiled by aot": Way("ddp", compiled="aot_eager"),
    "ddp, checkpoint": Way("ddp", checkpointed="function"),
    "fsdp2, no gradient sync": Way(accumulated=True),
    "fsdp2, compiled eagerly": Way(compiled="eager"),
    "fsdp2, checkpoint wrapper": Way(checkpointed="wrapper"),
    "fsdp2, checkpoint": Way(checkpointed="function"),
    "fsdp2, kept after forward": Way(sharding={"reshard_after_forward": False}),
    "fsdp2, resharded": Way(sharding={"reshard_after_forward": True}),
    "fsdp2, offloaded": Way(sharding={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "fsdp2, bf16 with float32 reduction": Way(
        sharding={
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        }
    ),
    "fsdp2, bf16 gradients": Way(
        sharding={"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    ),
}


def composed(rank: int, world: int) -> dict[str, Any]:
    """Train in all ways, clipped by stablekit and by hand."""
    return {
        name: {"ours": _train(way, rank, ours=True), "by hand": _train(way, rank, ours=False)}
        for name, way in WAYS.items()
    }


class _Net(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 1)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.checkpointed:
            hidden = checkpoint(self.second, hidden, use_reentrant=False)
        else:
            hidden = self.second(hidden)
        said: Tensor = self.last(torch.tanh(hidden))
        return said


def _train(way: Way, rank: int, *, ours: bool) -> dict[str, Any]:
    net = _Net(checkpointed=way.checkpointed == "function")
    names = [name for name, _ in net.named_parameters()]
    model = _treated(net, way)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    session = None
    if ours:
        session = stablekit.attach(
            optimizer, "nonfinite-guard", f"global-norm:max_norm={MAX_NORM}", model=model
        )
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        _accumulate(way, model, step, rank)
        if session is None:
            norms.append(float(full(clip_grad_norm_(model.parameters(), MAX_NORM))))
        optimizer.step()
        if session is not None:
            norms.append(session.metrics()["grad_norm"])
    seen = {"norms": norms, "weights": [full(p.detach()).clone() for p in model.parameters()]}
    if session is not None:
        seen["named as before"] = list(session.current_layout()[0].names) == names
        seen["clipped"] = session.latest.clipped_steps().get("global-norm", 0)
    return seen


def _treated(net: _Net, way: Way) -> nn.Module:
    if way.checkpointed == "wrapper":
        net.second = checkpoint_wrapper(net.second)  # type: ignore[assignment]
    model: nn.Module = net
    if way.engine == "fsdp2":
        for layer in (net.second, net):
            fully_shard(layer, mesh=mesh_of(torch.distributed.get_world_size()), **way.sharding)
    else:
        model = DistributedDataParallel(net)
    if way.compiled:
        compiled: Any = torch.compile(model, backend=way.compiled)
        return compiled  # type: ignore[no-any-return]  # a module around the module
    return model


def _accumulate(way: Way, model: nn.Module, step: int, rank: int) -> None:
    """Make the gradients of one step, of several batches where they are accumulated."""
    count = MICRO if way.accumulated else 1
    for micro in range(count):
        is_last = micro == count - 1
        make = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
        x, y = torch.randn(4, 6, generator=make), torch.randn(4, 1, generator=make)
        with _unsynchronised(way, model, is_last=is_last):
            loss = nn.functional.mse_loss(model(x).float(), y) / count
            loss.backward()


def _unsynchronised(way: Way, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    if way.engine == "fsdp2" and way.accumulated:
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    return contextlib.nullcontext()
