"""The processes that count, ``python -m benchmarks.scaling.ranks FOLDER``: worlds of 1, 2 and 4."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC2701 - torch has no public way to simulate ranks

from benchmarks.scaling.cases import counted
from benchmarks.scaling.first_step import requests
from benchmarks.scaling.plan import GLOO, PROCESSES, SIMULATING, share

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.scaling.cases import Case
    from benchmarks.scaling.counting import Counts

_TIMEOUT = timedelta(seconds=120)


def main(folder: Path) -> int:
    """Start the ranks; 1 if one failed."""
    # Forked, they need not import torch again, which takes longer than to count.
    ranks = [
        multiprocessing.get_context("fork").Process(target=count, args=(rank, folder))
        for rank in range(PROCESSES)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return int(any(rank.exitcode for rank in ranks))


def count(rank: int, folder: Path) -> None:
    """Count what one rank is there for and leave it in a file."""
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    seen: dict[Any, Any] = {}
    if rank in SIMULATING:
        seen["simulated"] = list(_simulated(share(rank)))
    for world, cases in GLOO.items():
        if rank < world:
            with _group("gloo", rank, world, init_method=f"file://{folder}/meeting{world}"):
                seen[world] = [counted(case) for case in cases]
                seen[f"requests {world}"] = requests()
                dist.barrier()
    torch.save(seen, folder / f"{rank}.pt")


def _simulated(planned: Sequence[Case]) -> Iterator[tuple[Counts, float]]:
    for mesh, cases in groupby(planned, key=lambda case: case.mesh):
        with _group("fake", mesh.copying_rank, mesh.ranks, store=FakeStore()):
            yield from map(counted, cases)


@contextmanager
def _group(backend: str, rank: int, world: int, **how: Any) -> Iterator[None]:  # noqa: ANN401 - torch's own
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=_TIMEOUT, **how)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
