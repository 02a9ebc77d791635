"""What ``test_two_ranks.py`` runs under torchrun: DDP and FSDP2, without a break and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import fully_shard

from stablekit_lightning import StableKitCallback
from tests.lightning.modules import Listener, Regression, batch_loss, fit

WORLD = 2
FAULTS = {5: float("nan")}


class Replicated(Regression):
    """Every rank takes a batch of its own, whose number follows from the step."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        number = self.global_step * WORLD + self.global_rank
        return batch_loss(self.net, number) * self.faults.get(number, 1.0)


class Sharded(Replicated):
    """The same, cut into pieces."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


def train(
    kind: str, steps: int, folder: Path, *, resume: bool = False
) -> tuple[StableKitCallback, torch.Tensor]:
    """Return the callback and the full weights after so many steps; save what was reached."""
    strategy: Strategy = DDPStrategy()
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    module = (Sharded if kind == "fsdp2" else Replicated)(FAULTS)
    listener = Listener()
    callback = StableKitCallback("nonfinite-guard", "adagc:warmup_steps=3", listener)
    trainer = fit(
        module,
        callback,
        batches=100,
        max_steps=steps,
        max_epochs=-1,
        devices=WORLD,
        strategy=strategy,
        ckpt_path=str(folder / kind) if resume else None,
    )
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    if not resume:
        trainer.save_checkpoint(folder / kind)
    return callback, torch.cat([p.detach().flatten() for p in whole])


def report(kind: str, folder: Path) -> dict[str, Any]:
    """Return what this rank saw, and whether a resumed run ended where one without a break did."""
    train(kind, 4, folder)
    resumed, resumed_weights = train(kind, 8, folder, resume=True)
    straight, weights = train(kind, 8, folder / "straight")
    listener: Listener = straight.session.plugins["listener"]  # type: ignore[assignment]
    return {
        "norms": repr(listener.norms),
        "losses": repr(listener.losses),
        "skipped": straight.session.skipped,
        "weights": weights.tolist(),
        "resumed": torch.equal(weights, resumed_weights)
        and repr(resumed.session.state_dict()) == repr(straight.session.state_dict()),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {kind: report(kind, folder) for kind in ("ddp", "fsdp2")}
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
