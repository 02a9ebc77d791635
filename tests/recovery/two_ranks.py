"""One of two ranks that train with rollback while something breaks on one of them: RANK FOLDER."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import stablekit
from stablekit.snapshots import Snapshot
from stablekit_clipping import ZClip
from stablekit_recovery import Escalation, LRBackoff, NonFiniteGuard, Rollback, SkipSpikes

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from stablekit import Plugin

GOOD, LATER = 18, 6
FAULTS = ("nan batch", "high loss", "broken weight", "broken state", "asked")
CASES = [
    *(("fsdp2", fault, "host") for fault in FAULTS),
    *(("fsdp2", fault, "device") for fault in ("nan batch", "high loss")),
    *(("ddp", fault, "host") for fault in ("nan batch", "broken weight")),
]


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def built(engine: str) -> nn.Module:
    """Return the same small model everywhere, five rows of which two ranks hold three and two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    if engine == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


@final
class Collectives(TorchDispatchMode):
    """Counts operations of torch.distributed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Run the operation."""
        is_one = func.namespace in ("c10d", "_c10d_functional")
        self.count += is_one and "wait" not in func.__name__
        return func(*args, **(kwargs or {}))


@final
class Run:
    """A model on one rank, its chain, and steps on named batches."""

    def __init__(
        self,
        engine: str,
        rank: int,
        *plugins: Plugin,
        device_mode: bool = False,
    ) -> None:
        """Attach."""
        self.rank, self.model = rank, built(engine)
        self.optimizer: Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.session = stablekit.attach(
            self.optimizer, *plugins, model=self.model, log_every=1, device_mode=device_mode
        )

    def step(self, batch: int, gain: float = 1.0) -> None:
        """Train on this rank's part of a batch, the loss times a gain."""
        noise = torch.Generator().manual_seed(2 * batch + self.rank)
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 6, generator=noise)).square().mean() * gain
        loss.backward()
        self.session.observe(loss=loss, batch=batch)
        self.optimizer.step()

    def everything(self) -> list[Tensor]:
        """Return weights and optimizer state, whole."""
        params = list(self.model.parameters())
        states = [value for p in params for value in self.optimizer.state[p].values()]
        return [full(tensor.detach()).clone() for tensor in (*params, *states)]


def chain() -> list[Any]:
    """Return a chain that acts within a few steps."""
    rollback = Rollback(4, calm=1, patience=3, max_skips=3, window=16, cooldown=0)
    spikes = SkipSpikes(window=16, warmup_steps=8, max_consecutive=1)
    return [NonFiniteGuard(), spikes, ZClip(warmup_steps=5), rollback]


def broken(run: Run, fault: str) -> None:
    """Take steps in which something breaks on the second rank only, until the run goes back."""
    first = next(iter(run.model.parameters()))
    rollback: Any = run.session.plugins["rollback"]
    for batch in range(100, 108):
        victim: Tensor = first.detach()
        if fault == "broken state":
            victim = run.optimizer.state[first]["exp_avg_sq"]
        if run.rank == 1 and fault.startswith("broken") and batch == 100:
            part = victim.to_local() if isinstance(victim, DTensor) else victim
            part.view(-1)[0] = math.inf if fault == "broken state" else math.nan
        gain = 1.0 if run.rank == 0 else {"nan batch": math.nan, "high loss": 500.0}.get(fault, 1.0)
        if fault == "asked":
            rollback.request("both ranks say so")
        if fault == "broken state":  # is looked at when a snapshot is due
            rollback.every = 1
        run.step(batch, gain)
        if any(event.kind == "rollback" for event in run.session.events):
            return


def case(engine: str, fault: str, rank: int, *, device_mode: bool) -> dict[str, Any]:
    """Return what this rank saw of a fault, and what a run without it is like."""
    run = Run(engine, rank, *chain(), device_mode=device_mode)
    for batch in range(GOOD):
        run.step(batch)
    broken(run, fault)
    after = run.everything()
    for batch in range(200, 200 + LATER):
        run.step(batch)
    event = next(event for event in run.session.events if event.kind == "rollback")
    twin = Run(engine, rank, *chain(), device_mode=device_mode)
    for batch in range(event.data["to_update"]):
        twin.step(batch)
    expected = twin.everything()
    for batch in range(200, 200 + LATER):
        twin.step(batch)
    return {
        "event": event.as_dict(),
        "went back to": after,
        "should have gone back to": expected,
        "end": run.everything(),
        "should have ended": twin.everything(),
        "updates": [run.session.updates, twin.session.updates],
    }


def memory(rank: int) -> dict[str, float]:
    """Return the bytes of a snapshot on this rank, and what they should be."""
    run = Run("fsdp2", rank)
    run.step(0)
    part = sum(p.to_local().numel() for p in run.model.parameters() if isinstance(p, DTensor))
    steps = 4 * len(list(run.model.parameters()))
    return {"bytes": Snapshot.take(run.session).nbytes, "expected": 12 * part + steps}


def counted(rank: int) -> list[int]:
    """Return the collectives of eight steps, of which the first and the fifth take a snapshot."""
    run = Run("fsdp2", rank, Rollback(4, calm=1))
    counts = []
    for batch in range(8):
        noise = torch.Generator().manual_seed(batch)
        run.optimizer.zero_grad()
        loss = run.model(torch.randn(4, 6, generator=noise)).square().mean()
        loss.backward()
        run.session.observe(loss=loss)
        with Collectives() as seen:  # type: ignore[no-untyped-call]
            run.optimizer.step()
        counts.append(seen.count)
    return counts


def escalated(rank: int) -> list[dict[str, Any]]:
    """Return the events of an escalation whose trouble is on one rank."""
    rollback = Rollback(4, calm=1, patience=20, max_skips=4, window=16, cooldown=0)
    skip = SkipSpikes(window=16, warmup_steps=8, max_consecutive=2)
    plugin = Escalation(skip=skip, backoff=LRBackoff(cooldown=0), rollback=rollback)
    run = Run("ddp", rank, plugin)
    for batch in range(GOOD):
        run.step(batch)
    for batch in range(4):
        run.step(100 + batch, 1.0 if rank == 0 else 2000.0)
    for batch in range(4):
        run.step(200 + batch, 1.0 if rank == 0 else math.nan)
    return [event.as_dict() for event in run.session.events if event.plugin]


def main(rank: int, folder: Path) -> None:
    """Join the group and leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        seen: dict[str, Any] = {
            f"{engine} {fault} {mode}": case(engine, fault, rank, device_mode=mode == "device")
            for engine, fault, mode in CASES
        }
        seen["memory"], seen["counted"] = memory(rank), counted(rank)
        seen["escalated"] = escalated(rank)
        torch.save(seen, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
