"""Assumptions about an accelerator and its network, and how long the terms of a cost take there.

Nothing here was measured: data sheets, and latencies of the usual size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from benchmarks.scaling.cost import Cost, Reduction
    from benchmarks.scaling.sizes import Held, Mesh


@final
@dataclass(frozen=True)
class Machine:
    """An H100 SXM in machines of eight, as published; seconds, bytes, bytes or operations a second.

    Args:
        flops: dense bf16 peak.
        utilisation: the share of it that training reaches.
        memory: HBM3 bandwidth.
        memory_share: the share of it that a pass over the gradients reaches.
        kernel: a small kernel; also what the host takes to issue one, the longer counts.
        batch: tensors that one launch of a multi-tensor kernel takes.
        read: a value read on the host, with the gap until the next kernels have come.
        node: accelerators in one machine.
        inside: bandwidth a direction between them (NVLink).
        outside: bandwidth a direction to other machines for each (400 Gb/s InfiniBand).
        start: a collective, before anything travels.
        hop_inside: latency of a hop of a tree inside a machine.
        hop_outside: and between machines.
    """

    flops: float = 989e12
    utilisation: float = 0.40
    memory: float = 3.35e12
    memory_share: float = 0.80
    kernel: float = 5e-6
    batch: int = 110
    read: float = 100e-6
    node: int = 8
    inside: float = 450e9
    outside: float = 50e9
    start: float = 10e-6
    hop_inside: float = 1e-6
    hop_outside: float = 5e-6


H100 = Machine()


@final
@dataclass(frozen=True)
class Times:
    """Seconds of a step that the terms of a cost take, one after the other: nothing overlaps."""

    memory: float = 0
    small_kernels: float = 0
    kernels_a_tensor: float = 0
    latency: float = 0
    payload: float = 0
    host_reads: float = 0

    @property
    def total(self) -> float:
        """The sum."""
        return sum(float(seconds) for seconds in vars(self).values())

    @property
    def first(self) -> str:
        """The name of the largest term."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))


def times(cost: Cost, held: Held, mesh: Mesh, machine: Machine = H100) -> Times:
    """Return how long a cost takes.

    What a fused kernel stores is traffic too; bytes of the reductions are with ``payload``.
    """
    stored = cost.stored * held.elements * held.itemsize
    grows = cost.each + cost.kernels - cost.kernels_once
    batches = cost.batched * (math.ceil(held.tensors / machine.batch) - 1)
    return Times(
        memory=(cost.bytes + stored) / (machine.memory * machine.memory_share),
        small_kernels=cost.kernels_once * machine.kernel,
        kernels_a_tensor=(grows + batches) * machine.kernel,
        latency=sum(latency(reduction, mesh, machine) for reduction in cost.reductions),
        payload=sum(transfer(reduction, mesh, machine) for reduction in cost.reductions),
        host_reads=cost.reads * machine.read,
    )


def latency(reduction: Reduction, mesh: Mesh, machine: Machine = H100) -> float:
    """Return the time of an all-reduce of nothing: up and down a tree over machines.

    Example:
        >>> from benchmarks.scaling.cost import Reduction
        >>> from benchmarks.scaling.sizes import Mesh
        >>> round(latency(Reduction(("shard",), 4), Mesh(shard=1024)) * 1e6)
        86
    """
    here, machines = spread(reduction.over, mesh, machine.node)
    up = machine.hop_inside * math.log2(here) + machine.hop_outside * math.log2(machines)
    return machine.start + 2 * up


def transfer(reduction: Reduction, mesh: Mesh, machine: Machine = H100) -> float:
    """Return the time the bytes of an all-reduce add: twice around a ring."""
    ranks = math.prod(mesh.dims.get(way, 1) for way in reduction.over)
    _, machines = spread(reduction.over, mesh, machine.node)
    bandwidth = machine.outside if machines > 1 else machine.inside
    return 2 * (ranks - 1) / ranks * reduction.payload / bandwidth


def spread(over: tuple[str, ...], mesh: Mesh, node: int) -> tuple[int, int]:
    """Return how many ranks of a group share a machine, and over how many machines it is.

    Example:
        >>> from benchmarks.scaling.sizes import Mesh
        >>> spread(("shard",), Mesh(shard=64, tensor=2), 8)
        (4, 16)
    """
    here, stride = 1, 1
    for way, size in reversed(mesh.dims.items()):
        if way in over:
            here *= max(1, min(size, node // stride))
        stride *= size
    ranks = math.prod(mesh.dims.get(way, 1) for way in over)
    return here, math.ceil(ranks / here)


def step_time(parameters: float, tokens: float, ranks: int, machine: Machine = H100) -> float:
    """Return the seconds of a training step: 6 operations a parameter and token."""
    return 6 * parameters * tokens / (ranks * machine.flops * machine.utilisation)
