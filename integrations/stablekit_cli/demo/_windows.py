"""Windows of bytes, drawn from a file in an order that a generator fixes."""

from __future__ import annotations

import torch

__all__ = ["held_out_windows", "to_tensor", "windows"]


def to_tensor(content: bytes) -> torch.Tensor:
    """Return the bytes of a file as a vector of int64."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def windows(
    content: torch.Tensor, context: int, count: int, order: torch.Generator
) -> torch.Tensor:
    """Return ``[count, context + 1]`` consecutive values, each row from a random place."""
    starts = torch.randint(len(content) - context, (count, 1), generator=order)
    return content[starts + torch.arange(context + 1)]


def held_out_windows(contents: list[bytes], context: int, total: int = 512) -> torch.Tensor:
    """Return about ``total`` windows, as many from every file, the same at every call."""
    order = torch.Generator().manual_seed(0)
    each = max(1, total // len(contents))
    return torch.cat([windows(to_tensor(one), context, each, order) for one in contents])
