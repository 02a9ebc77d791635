"""What ``test_torchrun.py`` starts: two ranks of a Trainer under DDP and FSDP2.

``python -m tests.transformers.two_ranks FOLDER`` forks them with the environment that torchrun
gives, so that imports are paid once; what each saw is in ``FOLDER/<rank>.pt``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import stablekit
import stablekit_transformers
from stablekit.errors import AttachError
from stablekit_transformers import StableKitCallback
from tests.transformers.tiny import FaultyTrainer, arguments, gpt2, steps, text

if TYPE_CHECKING:
    from transformers import TrainingArguments

WORLD = 2
STEPS, SAVED = 6, 3
NAN = float("nan")
FAULTS = {2: NAN, 4: NAN}
"""What multiplies the loss of the second rank, and of no other."""
GUARD = ("nonfinite-guard",)
CHAIN = ("nonfinite-guard", "autoclip:percentile=60", "adagc:warmup_steps=2")


class Case(NamedTuple):
    """One way to train."""

    mode: str
    """callback, attach or stock: without stablekit."""
    checkpoints: str = ""
    """Empty for DDP, otherwise what FSDP2 saves: SHARDED or FULL."""
    chain: tuple[str, ...] = CHAIN


CASES = {
    "ddp, callback": Case("callback"),
    "ddp, attach": Case("attach"),
    "ddp, guard": Case("attach", chain=GUARD),
    "fsdp2, callback": Case("callback", "SHARDED"),
    "fsdp2, attach": Case("attach", "SHARDED"),
    "fsdp2 whole, attach": Case("attach", "FULL"),
    "fsdp2, guard": Case("attach", "SHARDED", GUARD),
}
STOCK = {"ddp, stock": Case("stock"), "fsdp2, stock": Case("stock", "SHARDED")}
RESUMED = [name for name, case in CASES.items() if case.chain == CHAIN]


def settings(folder: Path, checkpoints: str) -> TrainingArguments:
    """Return arguments; on a CPU the Trainer shards only if it is told behind its back."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    made = arguments(
        folder,
        max_steps=STEPS,
        save_strategy="steps" if folder.name in RESUMED else "no",
        save_steps=SAVED,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        max_grad_norm=0.5,
        learning_rate=1e-2,
    )
    assert made.world_size == WORLD
    if checkpoints:
        kind = f"{checkpoints}_STATE_DICT"
        made.fsdp_plugin_args = {"fsdp_version": 2, "state_dict_type": kind}
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def equipped(case: Case, folder: Path, rank: int) -> tuple[FaultyTrainer, StableKitCallback]:
    callback = StableKitCallback(*case.chain)
    made = FaultyTrainer(
        model=gpt2(16),
        args=settings(folder, case.checkpoints),
        train_dataset=text(64),
        callbacks=[callback] if case.mode == "callback" else [],
    )
    made.faults = FAULTS if rank == 1 else {}
    if case.mode == "attach":
        callback = stablekit_transformers.attach(made, *case.chain)
    return made, callback


def whole(model: nn.Module) -> Tensor:
    params = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([param.detach().flatten() for param in params])


def log(made: FaultyTrainer) -> list[dict[str, float]]:
    return [{key: entry[key] for key in sorted(entry) if key != "epoch"} for entry in steps(made)]


def report(made: FaultyTrainer, callback: StableKitCallback) -> dict[str, Any]:
    assert made.model is not None
    session = callback.session
    return {
        "log": log(made),
        "weights": whole(made.model),
        "state": repr(session.state_dict()),
        "counts": [session.number, session.updates, session.skipped],
        "culprits": [event.tensors for event in session.events],
        "sharded": any(isinstance(param, DTensor) for param in made.model.parameters()),
    }


def run(name: str, root: Path, rank: int) -> dict[str, Any]:
    """Train without a break; then, in a new Trainer, from the checkpoint of half the way."""
    case, folder = CASES[name], root / name
    made, callback = equipped(case, folder, rank)
    made.train()
    seen = {"straight": report(made, callback)}
    if name in RESUMED:
        made, callback = equipped(case, folder, rank)
        checkpoint = str(folder / f"checkpoint-{SAVED}")
        made.train(resume_from_checkpoint=checkpoint)
        seen["resumed"] = report(made, callback)
    return seen


def stock(name: str, root: Path, rank: int) -> list[dict[str, float]]:
    """Return the log of a Trainer without stablekit, in which nothing goes wrong."""
    made, _ = equipped(STOCK[name], root / name, rank)
    made.faults = {}
    made.train()
    return log(made)


def refusal() -> str:
    """Return what is said of FSDP1."""
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    try:
        stablekit.attach(torch.optim.SGD(model.parameters()), "zclip")
    except AttachError as error:
        return str(error)
    return "not refused"


class Lines(logging.Handler):
    """Counts what is logged on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def work(rank: int, folder: Path) -> None:
    """Be one rank of every case."""
    torch.set_num_threads(1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ.update({key: str(value) for key, value in told.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=100),
    )
    lines = Lines()
    logging.getLogger("stablekit_transformers").addHandler(lines)
    cases = {name: run(name, folder, rank) for name in CASES}
    seen = {
        "cases": cases,
        "stock": {name: stock(name, folder, rank) for name in STOCK},
        "lines": lines.count,
        "fsdp1": refusal(),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Fork the ranks; return how many failed."""
    children = []
    for rank in range(WORLD):
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
