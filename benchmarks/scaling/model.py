"""The cost of one step with a chain of plugins, as the design has it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.scaling.members import MEMBERS
from benchmarks.scaling.over_steps import host_reads, kept
from benchmarks.scaling.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.cost import Cost
    from benchmarks.scaling.sizes import Held, Mesh


def step_cost(
    chain: Sequence[str],
    held: Held,
    mesh: Mesh,
    *,
    fused: bool = True,
    log_every: int = 10,
    device_mode: bool = True,
    on_meta: bool = False,
) -> Cost:
    """Return what a chain costs in a step in which nothing is clipped, the average over logging.

    Args:
        chain: names of :data:`~benchmarks.scaling.members.MEMBERS`, in order.
        held: what the rank holds.
        mesh: how the model is spread.
        fused: whether the optimizer's kernel takes a factor (``fused=True``).
        log_every: every how many steps metrics reach the host; 0 for never.
        device_mode: whether decisions stay on the device, as they do off the CPU.
        on_meta: on the meta device, whose values nobody reads.
    """
    walk = Walk(held, mesh, device_mode=device_mode)
    members = [MEMBERS[name] for name in chain]
    walk.open(members)
    for member in members:
        walk.visit(member)
    walk.close(fused=fused, log_every=log_every)
    letters = max(log_every - 1, 0) if device_mode else 0
    reads = host_reads(members, fused=fused, log_every=log_every, device_mode=device_mode)
    return replace(
        walk.cost(members),
        reads=0 if on_meta else reads,
        held=kept(members, held, mesh, letters),
    )
