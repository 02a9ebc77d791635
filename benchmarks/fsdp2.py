"""One of two ranks that hold a workload as FSDP2 shards it and time what is added to its steps.

Started by ``rows_fsdp2``: RANK WORKLOAD REPETITIONS CLOCK FOLDER. Gradients are those of one
backward pass; only the optimizer's step is timed, one thread a process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

import stablekit
from benchmarks.interleave import Case, Timings, interleave
from benchmarks.rows_unclipped import chain
from benchmarks.workloads import NORM, WORKLOADS, Workload, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

WORLD = 2
CASES = ("bare", "clip_grad_norm_", "zclip", "chain")


@final
class _Held(nn.Module):
    """The tensors of a workload, whose gradients are random and of the norm ``NORM``."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) for shape in shapes(workload)]
        self.weights = nn.ParameterList(nn.Parameter(weight * 0.02) for weight in drawn)
        self._half: float = NORM / sum(weight.numel() for weight in drawn) ** 0.5 / 0.04

    def forward(self) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum() * self._half


def sharded(workload: Workload) -> list[nn.Parameter]:
    """Return the workload's parameters sharded over all ranks, with the gradients of a step."""
    module = _Held(workload)
    fully_shard(module)
    module().backward()
    return list(module.parameters())


def measure(workload: Workload, repetitions: int, *, cpu_clock: bool) -> Timings:
    """Time steps of fused AdamW, bare and with what clips them; all of them move one model."""
    params = sharded(workload)
    optimizers = [torch.optim.AdamW(params, lr=1e-6, fused=True) for _ in CASES]
    for optimizer in optimizers:
        optimizer.state = optimizers[0].state
    bare, clipped, with_zclip, with_chain = optimizers
    sessions = [
        stablekit.attach(with_zclip, "zclip:warmup_steps=2"),
        stablekit.attach(with_chain, *chain()),
    ]

    def clip_and_step() -> None:
        clip_grad_norm_(params, 1.0)
        clipped.step()

    steps = (bare.step, clip_and_step, with_zclip.step, with_chain.step)
    cases = [Case(name, run, dist.barrier) for name, run in zip(CASES, steps, strict=True)]
    clock = time.thread_time if cpu_clock else time.perf_counter
    timings = interleave(cases, repetitions, clock=clock)
    for session in sessions:
        acted = [n for n, v in session.metrics().items() if n.endswith("/clipped") and v]
        if acted:
            raise RuntimeError(f"nothing should be clipped in these rows, but {acted} is not 0")
    return timings


def main(arguments: Sequence[str]) -> None:
    """Join the other rank, measure, and leave the seconds in a file if this is the first."""
    rank, workload, repetitions, clock, folder = arguments
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=WORLD
    )
    try:
        timings = measure(WORKLOADS[workload], int(repetitions), cpu_clock=clock == "cpu")
        if rank == "0":
            seconds = {name: timings.seconds(name) for name in CASES}
            (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
