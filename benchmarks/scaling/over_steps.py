"""What a session keeps from step to step, and how often it reads values on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.scaling.cost import FLOAT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.members import Member
    from benchmarks.scaling.sizes import Held, Mesh

_INDEX = 8
_PLACES, _PLACES_CUT = 1, 14
"""Bytes a tensor: whether it has a gradient; if sharded, that as a number, where it stands, and
whether in copies."""
_ONCE = 25
"""No overflow, nothing that rides along, and the norm before and after."""


def host_reads(
    members: Sequence[Member], *, fused: bool, log_every: int, device_mode: bool
) -> float:
    """Return how many values are read on the host a step, the average over logging.

    In device mode everything that waits goes in one copy every ``log_every`` steps, one more if
    someone takes the metrics. An optimizer without a fused kernel can only be kept from stepping by
    the host, so it reads one decision a step if any plugin may skip.
    """
    takes_metrics = any("metrics" in member.asks for member in members)
    if not device_mode:
        handed_out = takes_metrics / log_every if log_every else 0
        return 1 + sum(member.host_reads for member in members) + handed_out
    may_skip = any(member.skips for member in members)
    return ((1 + takes_metrics) / log_every if log_every else 0) + (may_skip and not fused)


def kept(members: Sequence[Member], held: Held, mesh: Mesh, letters: int) -> float:
    """Return the bytes kept: places of the parameters, statistics, what waits for the host.

    Args:
        members: the chain.
        held: what the rank holds.
        mesh: how the model is spread.
        letters: how many steps have left their norms to be read.
    """
    places = (_PLACES_CUT if mesh.is_cut else _PLACES) * held.tensors
    by_rows = mesh.shard > 1 and any("units" in member.asks for member in members)
    letter = FLOAT * (1 + held.tensors) + sum(member.letter.of(held) for member in members)
    own = sum(member.kept.of(held) for member in members)
    return _ONCE + places + (_INDEX * held.rows if by_rows else 0) + letters * letter + own
