"""The model at the size of real runs: what a step costs there, and which term is the largest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from benchmarks.scaling.deployments import DEPLOYMENTS
from benchmarks.scaling.machine import H100, step_time, times
from benchmarks.scaling.model import step_cost
from benchmarks.scaling.plan import FOUR, GUARDED
from benchmarks.scaling.torch_clip import torch_cost

if TYPE_CHECKING:
    from benchmarks.scaling.cost import Cost
    from benchmarks.scaling.deployments import Deployment
    from benchmarks.scaling.machine import Machine, Times

TORCH = ("clip_grad_norm_",)
WAYS = (TORCH, GUARDED, FOUR, ("nonfinite-guard", "agc"))


@final
@dataclass(frozen=True)
class Evaluated:
    """What one way of clipping costs in one deployment.

    Args:
        deployment: where.
        chain: what is attached.
        cost: in bytes and numbers, a step and rank.
        times: in seconds.
        step: seconds of the whole training step.
    """

    deployment: Deployment
    chain: tuple[str, ...]
    cost: Cost
    times: Times
    step: float

    @property
    def share(self) -> float:
        """The share of the training step."""
        return self.times.total / self.step

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        mesh, here = self.deployment.mesh, self.deployment.held
        return {
            "deployment": self.deployment.name,
            "mesh": asdict(mesh),
            "ranks": mesh.ranks,
            "held": asdict(here),
            "chain": list(self.chain),
            **asdict(self.cost),
            "collectives": len(self.cost.reductions),
            "payload": self.cost.payload,
            "seconds": asdict(self.times),
            "total_seconds": self.times.total,
            "step_seconds": self.step,
            "share": self.share,
            "first_bottleneck": self.times.first,
        }


def evaluate(machine: Machine = H100) -> list[Evaluated]:
    """Return every way of clipping in every deployment."""
    return [_evaluated(one, chain, machine) for one in DEPLOYMENTS for chain in WAYS]


def _evaluated(one: Deployment, chain: tuple[str, ...], machine: Machine) -> Evaluated:
    held, mesh = one.held, one.mesh
    cost = torch_cost(held, mesh) if chain == TORCH else step_cost(chain, held, mesh)
    step = step_time(one.active, one.tokens, mesh.ranks, machine)
    return Evaluated(one, chain, cost, times(cost, held, mesh, machine), step)
