"""L2 norms that stay exact to 1e-6 for tensors of any size, in one read of the data."""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

# torch's CPU norm loses digits with length (3e-3 at 40M elements) and is slow for half types; up to
# these sizes it is both exact and the fastest call there is.
_SHORT = 1 << 16
_SHORT_OTHER = 1 << 12
_ROW = 1 << 12
_WORTH_A_COPY = 4
_CHUNK = 1 << 18

_WIDE = {torch.float64, torch.complex128}

_DEVICE, _DTYPE = attrgetter("device"), attrgetter("dtype")

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


def flat(tensor: Tensor) -> Tensor:
    """Return the elements as a 1-D view in memory order, or a copy where they are not dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


@final
class Shapes:
    """Where tensors are and how large: the same every step, and slow to ask 146 tensors for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        """Ask the tensors."""
        self.devices = set(map(_DEVICE, tensors))
        self.sizes = tuple(map(Tensor.numel, tensors))
        self.dims = tuple(map(Tensor.dim, tensors))
        self._plans: dict[int, _Plan] = {}

    def plan(self, limit: int) -> _Plan:
        """Return how the tensors are best read; a norm is exact up to this many elements."""
        if limit not in self._plans:
            self._plans[limit] = _plan(self.sizes, self.dims, limit)
        return self._plans[limit]


def tensor_norms(tensors: list[Tensor], shapes: Shapes | None = None) -> Tensor:
    """Return the L2 norm of each dense tensor, float32 ``[len(tensors)]``, where the first is."""
    home = tensors[0].device
    devices = set(map(_DEVICE, tensors)) if shapes is None else shapes.devices
    if len(devices) == 1:
        return _on_one_device(tensors, shapes)
    norms = torch.zeros(len(tensors), device=home)
    for device in devices:
        where = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        read = _on_one_device([tensors[i] for i in where], None).to(home, non_blocking=True)
        norms = norms.index_copy(0, torch.tensor(where, device=home), read)
    return norms


def _on_one_device(tensors: list[Tensor], shapes: Shapes | None) -> Tensor:
    dtypes = set(map(_DTYPE, tensors))
    if any(dtype.is_complex for dtype in dtypes):
        tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
        shapes = None
    if tensors[0].device.type != "cpu":
        if not dtypes.isdisjoint(_WIDE):  # a kernel that narrows while it reads does not exist
            tensors = [t.float() if t.dtype in _WIDE else t for t in tensors]
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float32))
    shapes = Shapes(tensors) if shapes is None else shapes
    plan = shapes.plan(_SHORT if dtypes == {torch.float32} else _SHORT_OTHER)
    parts = [_row_norms([tensors[i] for i in row]) for row in plan.rows]
    if plan.short:
        short = [tensors[i] for i in plan.short]
        if dtypes != {torch.float32}:
            short = [tensor.float() for tensor in short]
        parts.append(torch.stack(torch._foreach_norm(short)))
    if plan.long:
        parts.append(torch.stack([_long_norm(tensors[i]) for i in plan.long]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)[plan.order]


class _Plan(NamedTuple):
    """How tensors of known sizes are best read; positions, and how to put results in order."""

    rows: list[list[int]]
    short: list[int]
    long: list[int]
    order: Tensor


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], dims: tuple[int, ...], limit: int) -> _Plan:
    """Join vectors of one length: as rows of a matrix their norms are one call, not many."""
    by_size: dict[int, list[int]] = {}
    for i, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        if dim == 1 and 0 < size <= _ROW:
            by_size.setdefault(size, []).append(i)
    rows = [row for row in by_size.values() if len(row) >= _WORTH_A_COPY]
    joined = {i for row in rows for i in row}
    alone = [i for i in range(len(sizes)) if i not in joined]
    short = [i for i in alone if sizes[i] <= limit]
    long = [i for i in alone if sizes[i] > limit]
    together = [i for row in rows for i in row] + short + long
    return _Plan(rows, short, long, torch.from_numpy(np.argsort(together)))


def _row_norms(vectors: list[Tensor]) -> Tensor:
    return vector_norm(torch.cat(vectors).float().view(len(vectors), -1), dim=1)


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
    rows = (torch.view_as_real(data.resolve_conj()) if data.is_complex() else data).flatten(1)
    if rows.shape[1] <= _SHORT and rows.dtype is torch.float64:
        return vector_norm(rows, dim=1).float()
    if rows.shape[1] <= _SHORT:
        return vector_norm(rows, dim=1, dtype=torch.float32)
    return torch.stack([_long_norm(row) for row in rows])


def joined_norms(parts: list[Tensor], home: torch.device) -> Tensor:
    """Return the L2 norm of each vector in a list, float32 ``[len(parts)]``, in a few operations.

    Squares add up in float64: one by one in float32 they would lose digits with their number.
    """
    owner = _owner(tuple(map(Tensor.numel, parts)), home)
    squares = torch.cat([part.to(home) for part in parts]).double().square()
    sums = torch.zeros(len(parts), dtype=torch.float64, device=home)
    return sums.index_add(0, owner, squares).sqrt().float()


def joined_any(flags: Tensor, sizes: tuple[int, ...]) -> list[bool]:
    """Tell for each stretch of a joined bool vector whether any element of it is true."""
    if not bool(flags.any()):
        return [False] * len(sizes)
    counts = torch.zeros(len(sizes), device=flags.device)
    counts = counts.index_add(0, _owner(sizes, flags.device), flags.float())
    return [count > 0 for count in counts.tolist()]


def _owner(sizes: tuple[int, ...], home: torch.device) -> Tensor:
    """Return, for each element of joined vectors, the number of the vector it is from."""
    return torch.from_numpy(_repeats(sizes)).to(home, non_blocking=True)


# Arrays, not tensors, are kept between calls: a tensor made under another default device or mode
# would come back where it does not belong.
@functools.lru_cache(maxsize=64)
def _repeats(sizes: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.repeat(np.arange(len(sizes)), sizes)
