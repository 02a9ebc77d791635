"""The comparison of the model with what was counted, term by term."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from benchmarks.scaling.cases import LOG_EVERY, TORCH, Case
from benchmarks.scaling.cost import Cost
from benchmarks.scaling.first_step import at_store
from benchmarks.scaling.model import step_cost
from benchmarks.scaling.plan import GLOO, PROCESSES, SIMULATING, share
from benchmarks.scaling.sizes import held
from benchmarks.scaling.torch_clip import torch_cost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.scaling.counting import Counts

_ROOT = Path(__file__).parents[2]
_PATIENCE = 300

TOLERANCE = {
    "collectives": (0.0, 0),
    "payload": (0.0, 0),
    "reads": (0.0, 0),
    "requests": (0.0, 0),
    "bytes": (0.02, 512),
    "kernels": (0.02, 2),
    "held": (0.10, 256),
    "temporary": (0.10, 512),
}
"""How far the model may be off: a share of what was counted, or so many."""


@final
@dataclass(frozen=True)
class Checked:
    """One term of one case.

    Args:
        where: processes, and how the model is spread over them.
        chain: what was attached.
        term: which term.
        model: what the model says.
        counted: what was counted, on the rank that is farthest from it.
    """

    where: str
    chain: str
    term: str
    model: float
    counted: float

    @property
    def off(self) -> float:
        """How far the model is off, as a share of what the term tolerates."""
        part, number = TOLERANCE[self.term]
        error, allowed = abs(self.model - self.counted), max(part * self.counted, number)
        return error / allowed if allowed else math.inf * error if error else 0.0

    @property
    def holds(self) -> bool:
        """Whether the model is within the tolerance of the term."""
        return self.off <= 1


def check() -> list[Checked]:
    """Count in fresh processes and compare."""
    ranks = _run()
    rows: list[Checked] = []
    for world, cases in GLOO.items():
        seen = [rank[world] for rank in ranks if world in rank]
        where = f"{world} process{'es' if world > 1 else ''}"
        for i, case in enumerate(cases):
            rows += compared(case, where, [one[i] for one in seen])
        asked = sum(rank.get(f"requests {world}", 0) for rank in ranks)
        rows.append(Checked(where, "first step", "requests", at_store(world), asked))
    for rank in SIMULATING:
        for case, counts in zip(share(rank), ranks[rank]["simulated"], strict=True):
            rows += compared(case, "simulated", [counts])
    return rows


def compared(case: Case, where: str, counts: Sequence[tuple[Counts, float]]) -> Iterator[Checked]:
    """Compare the terms that a case can show.

    On a CPU small tensors are read by other operations than on an accelerator, and copies to the
    host are operations too: there small operations and temporary values are not compared. On the
    meta device nothing waits for the host.
    """
    cost = predicted(case)
    pairs: dict[str, tuple[float, list[float]]] = {
        "collectives": (len(cost.reductions), [one.collectives for one, _ in counts]),
        "payload": (cost.payload, [one.payload for one, _ in counts]),
        "reads": (cost.reads, [one.reads for one, _ in counts]),
        "bytes": (cost.bytes, [one.bytes for one, _ in counts]),
    }
    if case.simulated:
        pairs["kernels"] = cost.kernels, [one.kernels for one, _ in counts]
        pairs["temporary"] = cost.temporary, [one.temporary for one, _ in counts]
    if case.device_mode and case.chain != (TORCH,):
        pairs["held"] = cost.held, [kept for _, kept in counts]
    label = f"{' + '.join(case.chain)}{_how(case)}"
    for term, (model, values) in pairs.items():
        farthest = max(values, key=lambda value: abs(value - model))
        yield Checked(f"{where}, {case.mesh}", label, term, model, farthest)


def predicted(case: Case) -> Cost:
    """Return what the model says of a case."""
    here = held(case.shapes, case.mesh)
    if case.chain == (TORCH,):
        return torch_cost(here, case.mesh, by_hand=False)
    return step_cost(
        case.chain,
        here,
        case.mesh,
        fused=case.fused,
        log_every=LOG_EVERY,
        device_mode=case.device_mode,
        on_meta=case.simulated,
    )


def _how(case: Case) -> str:
    notes = ["" if case.fused else "not fused", "" if case.device_mode else "host mode"]
    return "".join(f", {note}" for note in notes if note)


def _run() -> list[dict[Any, Any]]:
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.scaling.ranks", folder],
            check=True,
            cwd=_ROOT,
            env={**os.environ, **quiet},
            timeout=_PATIENCE,
        )
        files = [Path(folder) / f"{rank}.pt" for rank in range(PROCESSES)]
        return [torch.load(file, weights_only=False) for file in files]
