"""Writing pending factors into the gradients: at most one pass, none where every factor is 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit._ledger import Ledger


def commit(ledger: Ledger) -> None:
    """Multiply the gradients by everything pending, and by the inverse loss scale if any."""
    factor = _with_unscale(ledger)
    by_units = _acting_units(ledger)
    for i in by_units:
        _multiply_units_(ledger, i, factor)
    rest = [i for i in ledger.memory.held if i not in by_units] if by_units else ledger.memory.held
    if factor is not None and factor.ndim == 0:
        if not ledger.host or factor != 1:
            multiply_(_local(ledger, rest), factor)
    elif factor is not None:
        _multiply_each_(ledger, rest, factor)
    ledger.was_written()


def multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of any device and dtype by one 0-dim float32 factor, in place.

    The factor stays a tensor: as a Python number foreach would round it to the tensors' dtype.
    """
    for device, same in _by_device(tensors).items():
        torch._foreach_mul_(same, factor.to(device, non_blocking=True))


def _with_unscale(ledger: Ledger) -> Tensor | None:
    unscale = ledger.memory.unscale
    if unscale is None:
        return ledger.factor
    return unscale if ledger.factor is None else ledger.factor * unscale


def _multiply_units_(ledger: Ledger, i: int, factor: Tensor | None) -> None:
    """Multiply the units of one tensor by their own factors and by what holds for all of it."""
    units = ledger.unit_factors[i]
    if factor is not None:
        units = units * (factor if factor.ndim == 0 else factor[i])
    ledger.memory.local(i).mul_(ledger.memory.over_units(units, i))


def _multiply_each_(ledger: Ledger, positions: Iterable[int], factor: Tensor) -> None:
    if ledger.host:
        values = factor.tolist()
        positions = [i for i in positions if values[i] != 1]
    for device, where in _positions_by_device(ledger, positions).items():
        factors = factor[ledger.layout.subset(tuple(where))].to(device, non_blocking=True)
        torch._foreach_mul_(_local(ledger, where), list(factors.unbind()))


def _acting_units(ledger: Ledger) -> set[int]:
    """Return the tensors here that have unit factors; on the host those are not all 1."""
    return {i for i in ledger.unit_factors if ledger.memory.data[i] is not None}


def _local(ledger: Ledger, positions: Iterable[int]) -> list[Tensor]:
    return [ledger.memory.local(i) for i in positions]


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _positions_by_device(ledger: Ledger, positions: Iterable[int]) -> dict[torch.device, list[int]]:
    groups: dict[torch.device, list[int]] = {}
    for i in positions:
        groups.setdefault(ledger.memory.local(i).device, []).append(i)
    return groups
