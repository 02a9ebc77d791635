"""Writing pending factors into the gradients: at most one pass, none where every factor is 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekit._ledger import over_units

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit._ledger import Ledger


def commit(ledger: Ledger) -> None:
    """Multiply the gradients by everything pending, and by the inverse loss scale if any."""
    factor = _with_unscale(ledger)
    for i, units in _acting_units(ledger):
        data = ledger.data[i]
        assert data is not None
        data.mul_(over_units(units, data))
    if factor is not None and factor.ndim == 0:
        if not ledger.host or factor != 1:
            multiply_(_held(ledger, ledger.held), factor)
    elif factor is not None:
        _multiply_each_(ledger, factor)
    ledger.was_written()


def multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of any device and dtype by one 0-dim float32 factor, in place.

    The factor stays a tensor: as a Python number foreach would round it to the tensors' dtype.
    """
    for device, same in _by_device(tensors).items():
        torch._foreach_mul_(same, factor.to(device, non_blocking=True))


def _with_unscale(ledger: Ledger) -> Tensor | None:
    if ledger.unscale is None:
        return ledger.factor
    return ledger.unscale if ledger.factor is None else ledger.factor * ledger.unscale


def _multiply_each_(ledger: Ledger, factor: Tensor) -> None:
    acting: Iterable[int] = ledger.held
    if ledger.host:
        values = factor.tolist()
        acting = [i for i in ledger.held if values[i] != 1]
    factors = factor.unbind()
    for device, where in _positions_by_device(ledger, acting).items():
        torch._foreach_mul_(
            _held(ledger, where), [factors[i].to(device, non_blocking=True) for i in where]
        )


def _acting_units(ledger: Ledger) -> list[tuple[int, Tensor]]:
    """Return the tensors whose unit factors are not all 1; all of them where that is unknown."""
    items = list(ledger.unit_factors.items())
    if not items or not ledger.host:
        return items
    lowest = torch.stack([(units != 1).any().to(ledger.layout.device) for _, units in items])
    return [item for item, acts in zip(items, lowest.tolist(), strict=True) if acts]


def _held(ledger: Ledger, indices: Iterable[int]) -> list[Tensor]:
    return [data for data in (ledger.data[i] for i in indices) if data is not None]


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _positions_by_device(ledger: Ledger, indices: Iterable[int]) -> dict[torch.device, list[int]]:
    groups: dict[torch.device, list[int]] = {}
    for i in indices:
        data = ledger.data[i]
        if data is not None:
            groups.setdefault(data.device, []).append(i)
    return groups
