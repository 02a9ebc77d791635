"""L2 norms that stay exact to 1e-6 for tensors of any size, in one read of the data."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# torch's CPU norm loses digits with length (3e-3 at 40M elements) and is slow for half types; up to
# these sizes it is both exact and the fastest call there is.
_SHORT = 1 << 16
_SHORT_OTHER = 1 << 12
_ROW = 1 << 12
_CHUNK = 1 << 18

_DEVICE, _DTYPE = attrgetter("device"), attrgetter("dtype")

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


def flat(tensor: Tensor) -> Tensor:
    """Return the elements as a 1-D view in memory order, or a copy where they are not dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def tensor_norms(tensors: list[Tensor]) -> Tensor:
    """Return the L2 norm of each dense tensor, float32 ``[len(tensors)]``, where the first is."""
    home = tensors[0].device
    devices = set(map(_DEVICE, tensors))
    if len(devices) == 1:
        return torch.stack(list(_on_one_device(tensors)))
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for device in devices:
        where = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for i, norm in zip(where, _on_one_device([tensors[i] for i in where]), strict=True):
            norms[i] = norm.to(home, non_blocking=True)
    return torch.stack(norms)


def _on_one_device(tensors: list[Tensor]) -> Sequence[Tensor]:
    dtypes = set(map(_DTYPE, tensors))
    if any(dtype.is_complex for dtype in dtypes):
        tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    if tensors[0].device.type != "cpu":
        return torch._foreach_norm(tensors, 2, torch.float32)
    limit = _SHORT if dtypes == {torch.float32} else _SHORT_OTHER
    sizes = list(map(Tensor.numel, tensors))
    if max(sizes) <= limit:
        return _short_norms(tensors)
    short = [tensor for tensor, size in zip(tensors, sizes, strict=True) if size <= limit]
    quick = iter(_short_norms(short) if short else ())
    return [
        next(quick) if size <= limit else _long_norm(tensor)
        for tensor, size in zip(tensors, sizes, strict=True)
    ]


def _short_norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    if all(t.dtype is torch.float32 for t in tensors):
        return torch._foreach_norm(tensors)
    return torch._foreach_norm([t.float() for t in tensors])


def _long_norm(tensor: Tensor) -> Tensor:
    """Return the norm of one long tensor by short partial norms, accumulated in float32."""
    data = flat(tensor)
    if data.dtype is not torch.float32:
        return vector_norm(torch.stack([_dot_norm(c.float()) for c in data.split(_CHUNK)]))
    rows = data.numel() // _ROW
    body = vector_norm(vector_norm(data[: rows * _ROW].view(rows, _ROW), dim=1))
    if data.numel() == rows * _ROW:
        return body
    return torch.hypot(body, vector_norm(data[rows * _ROW :]))


def _dot_norm(chunk: Tensor) -> Tensor:
    return torch.dot(chunk, chunk).sqrt()


def unit_norms(data: Tensor) -> Tensor:
    """Return the L2 norm of each output unit (row of dim 0) of a matrix or higher tensor."""
    return vector_norm(data.flatten(1), dim=1, dtype=torch.float32)


def joined_norms(parts: list[Tensor], home: torch.device) -> Tensor:
    """Return the L2 norm of each vector in a list, float32 ``[len(parts)]``, in a few operations.

    Squares add up in float64: one by one in float32 they would lose digits with their number.
    """
    sizes = torch.tensor([part.numel() for part in parts], device=home)
    owner = torch.repeat_interleave(sizes, output_size=sum(part.numel() for part in parts))
    squares = torch.cat([part.to(home) for part in parts]).double().square()
    sums = torch.zeros(len(parts), dtype=torch.float64, device=home)
    return sums.index_add(0, owner, squares).sqrt().float()
