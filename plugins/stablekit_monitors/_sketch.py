"""A random projection of all gradients to a few thousand numbers that keeps lengths and angles.

A count sketch (Charikar et al., Finding frequent items in data streams, 2002) whose pattern follows
from the names of the tensors and the places of their elements: every process, however tensors are
cut, and every resumed run projects alike.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["WIDTH", "add_", "fold"]

WIDTH = 4093
"""How many numbers a sketch has; prime, so that no column of a matrix falls on one of them."""

BLOCK = 61 * WIDTH
"""Elements with signs of their own; further ones take the same signs times one for each block."""

_AT_ONCE = 64


def add_(total: Tensor, data: Tensor, *, name: str, first: int = 0, share: float = 1.0) -> None:
    """Add a tensor, or a part of it, to a float32 ``[BLOCK]`` that :func:`fold` makes a sketch of.

    Args:
        total: is added to.
        data: consecutive elements of the tensor, flat.
        name: the tensor's.
        first: place of the first of them in the whole tensor.
        share: multiplies them.
    """
    start = crc32(name.encode()) % BLOCK + first
    turns = _turns(name, (start + data.numel()) // BLOCK + 1).to(data.device) * share
    block, place = divmod(start, BLOCK)
    for part in _cut(data, BLOCK - place):
        if part.ndim == 2:
            total += turns[block : block + len(part)] @ part.float()
            block, place = block + len(part), 0
        else:
            total[place : place + len(part)].add_(part.float() * turns[block])
            block, place = block + 1, 0


def fold(total: Tensor) -> Tensor:
    """Return the sketch, float32 ``[WIDTH]``, of what was added up."""
    return (total * _signs().to(total.device)).view(-1, WIDTH).sum(0)


def _cut(data: Tensor, room: int) -> Iterable[Tensor]:
    """Yield what fits into the block begun, then whole blocks as rows, then the rest."""
    head = min(room % BLOCK, data.numel())
    if head:
        yield data[:head]
    rows = (data.numel() - head) // BLOCK
    if rows:
        yield from data[head : head + rows * BLOCK].view(rows, BLOCK).split(_AT_ONCE)
    if head + rows * BLOCK < data.numel():
        yield data[head + rows * BLOCK :]


@lru_cache(maxsize=1)
def _signs() -> Tensor:
    return _random_signs(0, BLOCK)


def _turns(name: str, count: int) -> Tensor:
    return _random_signs(1 + crc32(name.encode()), count)


def _random_signs(seed: int, count: int) -> Tensor:
    maker = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=maker).float() * 2 - 1
