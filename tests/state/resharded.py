"""Runs that two ranks saved with torch.distributed.checkpoint and one and four go on with.

``python -m tests.state.resharded FOLDER`` forks the ranks, so that imports are paid once. What
every run saw from the checkpoint on is in ``FOLDER/<world>-<rank>.pt``; world 0 had no break.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import stablekit
from stablekit.checkpoint import SessionState
from stablekit_recovery import NonFiniteGuard
from tests.state.resumable import VARIANTS, compute_loss, set_gradients, small_model

WRITERS = 2
READERS = (1, 4)
FIRST, SAVED, STEPS = 12, 24, 38  # NaN, Inf, zeros and spikes come after the checkpoint


class Training(NamedTuple):
    """A model in the form a world needs, and what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    session: stablekit.Session


class AppState:
    """What torch's tutorial puts into a checkpoint: model and optimizer, one after the other."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.training.model,
            self.training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def begin(name: str, world: int) -> Training:
    model = small_model()
    if world > 1:
        for layer in (model.get_submodule("0"), model.get_submodule("2"), model):
            fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    plugin = made(name)
    chain = [plugin] if isinstance(plugin, NonFiniteGuard) else [NonFiniteGuard(), plugin]
    return Training(model, optimizer, stablekit.attach(optimizer, *chain, model=model))


def go_on(training: Training, first: int, last: int) -> list[dict[str, float]]:
    """Step with gradients that are the same however they are cut; return the metrics."""
    whole, metrics = small_model(), []
    for step in range(first, last):
        compute_loss(training.session, step)
        set_gradients(whole, step)
        for param, twin in zip(training.model.parameters(), whole.parameters(), strict=True):
            param.grad = None if twin.grad is None else placed_like(param, twin.grad)
        training.optimizer.step()
        metrics.append(training.session.metrics())
    return metrics


def placed_like(param: Tensor, grad: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return grad
    return distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)


def seen(training: Training, metrics: list[dict[str, float]]) -> dict[str, Any]:
    params = training.model.parameters()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
    return {
        "metrics": metrics,
        "events": [event.as_dict() for event in training.session.events],
        "counts": [training.session.number, training.session.updates, training.session.skipped],
        "weights": torch.cat([param.detach().flatten() for param in whole]),
    }


def states(training: Training, order: str) -> dict[str, Any]:
    """Return what goes into a checkpoint; keys are loaded in the order of the alphabet."""
    session = SessionState(training.session)
    if order == "session first":
        return {"a_session": session, "b_app": AppState(training)}
    return {"app": AppState(training), "stablekit": session}


@functools.cache
def factories() -> dict[str, Any]:
    """Return the classes of the plugins that have a state."""
    points = {name: info.entry_point for name, info in stablekit.available().items()}
    classes = {name: pkgutil.resolve_name(point) for name, point in points.items()}
    return {name: cls for name, cls in classes.items() if hasattr(cls, "state_dict")}


def names() -> list[str]:
    """Return these plugins, and variants of some."""
    return [*factories(), *VARIANTS]


def made(name: str) -> Any:  # noqa: ANN401 - any plugin, or a string
    factory = factories().get(name, lambda: name)
    return factory.example() if hasattr(factory, "example") else factory()


def order_of(name: str) -> str:
    return ("session first", "optimizer first")[names().index(name) % 2]


def write(name: str, folder: Path) -> dict[str, Any]:
    """Train without a break, leaving a checkpoint on the way."""
    training = begin(name, WRITERS)
    go_on(training, FIRST, SAVED)
    save(states(training, order_of(name)), checkpoint_id=folder)
    return seen(training, go_on(training, SAVED, STEPS))


def read(name: str, folder: Path, world: int) -> dict[str, Any]:
    """Go on from a checkpoint."""
    training = begin(name, world)
    load(states(training, order_of(name)), checkpoint_id=folder)
    return seen(training, go_on(training, SAVED, STEPS))


def each(stage: int, world: int, folder: Path) -> dict[str, Any]:
    """Do one of these for every plugin; one that fails does not keep the others from it."""
    result: dict[str, Any] = {}
    for i, name in enumerate(names()):
        place = folder / f"checkpoint{i}"
        try:
            result[name] = read(name, place, world) if stage else write(name, place)
        except Exception:  # noqa: BLE001 - it is for the test to say
            result[name] = {"failed": traceback.format_exc()}
    return result


def work(rank: int, folder: Path) -> None:
    """Be one rank of each world that has so many, one world after the other."""
    torch.set_num_threads(1)
    for stage, world in enumerate((WRITERS, *READERS)):
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting{stage}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        torch.save(each(stage, world, folder), folder / f"{world if stage else 0}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def main(folder: Path) -> int:
    """Fork the ranks; return how many failed."""
    children = []
    for rank in range(max(READERS)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(rank, folder)
                code = 0
            except BaseException:  # noqa: BLE001 - the end of the process
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return sum(bool(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
