"""What ``test_two_ranks.py`` starts: two ranks that train with Accelerate under DDP and FSDP2.

``python -m tests.accelerate.two_ranks FOLDER`` forks them, so that imports are paid once; what each
saw is in ``FOLDER/<rank>.pt``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import stablekit_accelerate
from tests.accelerate.loops import NAN, Notebook, Prepared, adamw, forget, loss_of, network

WORLD, MICRO = 2, 2
STEPS, SAVED = 9, 5
LIMIT = 0.5
BAD = {(3, 0, 1): NAN, (7, 1, 0): NAN}
"""(step, micro-batch, rank) -> what multiplies the loss, elsewhere 1 + step."""
ORACLE = ("nonfinite-guard",)
CHAIN = ("nonfinite-guard", "autoclip:percentile=60", "adagc:warmup_steps=2", "zclip")


class Case(NamedTuple):
    """One way to train."""

    engine: str
    """ddp; sharded or full: FSDP2 by Accelerate, named after its checkpoints; by hand."""
    first: str = "prepare"
    chain: tuple[str, ...] = CHAIN


CASES = {
    "ddp": Case("ddp"),
    "ddp, attach first": Case("ddp", "attach"),
    "ddp, guard": Case("ddp", chain=ORACLE),
    "fsdp2": Case("sharded"),
    "fsdp2, attach first": Case("full", "attach"),
    "fsdp2, guard": Case("sharded", chain=ORACLE),
    "fsdp2 by hand": Case("by hand", chain=ORACLE),
}
RESUMED = ("ddp", "fsdp2", "fsdp2, attach first")


def accelerator_for(engine: str, notebook: Notebook) -> Any:  # noqa: ANN401 - Accelerate has no types
    """Return an accelerator; on a CPU it shards only if it is told behind its back."""
    forget()
    made = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, log_with=[notebook])
    made.init_trackers("run")
    if engine in {"sharded", "full"}:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=f"{engine.upper()}_STATE_DICT"
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
    return made


def begin(case: Case, notebook: Notebook) -> Prepared:
    """Prepare model and optimizer and attach, in either order."""
    accelerator, model = accelerator_for(case.engine, notebook), network()
    if case.engine == "by hand":
        fully_shard(model)
    optimizer: Any = adamw(model)
    session = None

    def attach() -> Any:  # noqa: ANN401 - a Session
        return stablekit_accelerate.attach(accelerator, optimizer, *case.chain, model=model)

    if case.first == "attach":
        session = attach()
    if case.engine == "by hand":
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    return Prepared(accelerator, model, optimizer, session or attach())


def gain(step: int, micro: int, rank: int) -> float:
    return BAD.get((step, micro, rank), 1.0 + step)


def go_on(kit: Prepared, first: int, last: int) -> list[dict[str, Any]]:
    """Train as the loops of Accelerate's documentation do, on other data on each rank."""
    rank, seen = kit.accelerator.process_index, []
    for step in range(first, last):
        for micro in range(MICRO):
            with kit.accelerator.accumulate(kit.model):
                number = (step * MICRO + micro) * WORLD + rank
                kit.accelerator.backward(loss_of(kit.model, number, gain(step, micro, rank)))
                if kit.accelerator.sync_gradients:
                    norm = kit.accelerator.clip_grad_norm_(kit.model.parameters(), LIMIT)
                kit.optimizer.step()
                kit.optimizer.zero_grad()
        skipped = kit.accelerator.optimizer_step_was_skipped
        seen.append({**kit.session.metrics(), "returned": float(norm), "skipped": float(skipped)})
    return seen


def whole(model: nn.Module) -> Tensor:
    params = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([param.detach().flatten() for param in params])


def report(kit: Prepared, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "steps": steps,
        "weights": whole(kit.model),
        "state": repr(kit.session.state_dict()),
        "culprits": [event.tensors for event in kit.session.events],
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    """Train without a break; where that is asked for, also from what was saved on the way."""
    case, notebook = CASES[name], Notebook()
    kit = begin(case, notebook)
    place = folder / name
    steps = go_on(kit, 0, SAVED)
    if name in RESUMED:
        kit.accelerator.save_state(str(place))
    seen: dict[str, Any] = {"straight": report(kit, steps + go_on(kit, SAVED, STEPS))}
    seen["pages"] = len(notebook.pages)
    if name in RESUMED:
        kit = begin(case, Notebook())
        kit.accelerator.load_state(str(place))
        seen["number"] = kit.session.number
        seen["resumed"] = report(kit, go_on(kit, SAVED, STEPS))
        seen["files"] = sorted(path.name for path in place.glob("stablekit*"))
    return seen


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
    logging.getLogger("stablekit_accelerate").addHandler(lines)
    seen: dict[str, Any] = {name: run(name, folder) for name in CASES}
    torch.save({"cases": seen, "lines": lines.count}, folder / f"{rank}.pt")
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
