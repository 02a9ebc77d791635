"""What the tests of the gradients share: odd tensors, and naive books kept in float64."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stablekit._commit import commit
from stablekit._layout import Layout
from stablekit._ledger import Ledger
from stablekit._memory import Memory
from stablekit.gradients import Gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMES = ("matrix", "vector", "scalar", "kernel", "frozen", "rows", "elements", "empty", "half")


def parameters(seed: int = 0) -> list[Tensor]:
    """Return parameters of every kind, with gradients."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), (), (2, 3, 2), (3, 2), (6, 2), (3, 3), (0, 4), (4, 2)]
    params: list[Tensor] = [
        nn.Parameter(torch.randn(shape, generator=make) + 0.1) for shape in shapes
    ]
    for param in params:
        param.grad = torch.randn(param.shape, generator=make)
    params[4].grad = None
    twice = torch.tensor([[1, 4, 1]])
    values = torch.randn(3, 2, generator=make)
    params[5].grad = torch.sparse_coo_tensor(twice, values, (6, 2), check_invariants=True)
    params[6].grad = torch.randn(3, 3, generator=make).to_sparse()
    params[8] = nn.Parameter(params[8].detach().bfloat16())
    params[8].grad = torch.randn(4, 2, generator=make).bfloat16()
    return params


def ledger_of(params: list[Tensor], *, host: bool = True, units: bool = False) -> Ledger:
    """Open the books on parameters named as above."""
    layout = Layout(params, NAMES[: len(params)], [0] * len(params))
    memory = Memory(params, layout, unscale=None, ride=None)
    return Ledger(memory, host=host, units=layout.everywhere if units else ())


def view_of(ledger: Ledger, chosen: tuple[int, ...] | None = None) -> Gradients:
    """Return the gradients as a plugin sees them in transform_gradients."""
    return Gradients(ledger, chosen, writable=True)


@final
class NaiveBooks:
    """The same gradients in float64, changed and measured at once."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Copy what the gradients hold."""
        self.data = [_dense(param) for param in params]

    def scale(self, positions: Sequence[int], factors: Tensor) -> None:
        """Multiply tensors."""
        for i, factor in zip(positions, factors.expand(len(positions)), strict=True):
            self._change(i, partial(torch.mul, other=factor.double()))

    def scale_units(self, positions: Sequence[int], factors: Sequence[Tensor]) -> None:
        """Multiply rows of matrices, all of a vector."""
        for i, factor in zip(positions, factors, strict=True):
            self._change(i, partial(_times_rows, factor.double()))

    def clamp(self, positions: Sequence[int], limit: float) -> None:
        """Clamp elements."""
        for i in positions:
            self._change(i, lambda data: data.clamp(-limit, limit))

    def norms(self) -> list[float]:
        """Return L2 norms by the definition."""
        return [0.0 if data is None else data.square().sum().sqrt().item() for data in self.data]

    def amaxes(self) -> list[float]:
        """Return the largest absolute elements."""
        return [max([abs(x) for x in _elements(data)], default=0.0) for data in self.data]

    def units(self, i: int, count: int) -> list[float]:
        """Return the norms of rows, of the whole of a vector, zeros without a gradient."""
        data = self.data[i]
        if data is None:
            return [0.0] * count
        rows = data if data.ndim > 1 else data.reshape(1, -1)
        return [row.square().sum().sqrt().item() for row in rows]

    def _change(self, i: int, change: Callable[[Tensor], Tensor]) -> None:
        data = self.data[i]
        if data is not None:
            self.data[i] = change(data)


@final
class Writes(TorchDispatchMode):
    """Counts the gradient tensors that in-place operations write to."""

    def __init__(self, ledger: Ledger) -> None:
        """Watch the data of a ledger."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = {
            data.data_ptr() for data in ledger.memory.data if data is not None and data.numel()
        }
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Run the operation and look at what it writes."""
        if func._schema.is_mutable:
            targets = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.count += sum(target.data_ptr() in self.watched for target in targets)
        return func(*args, **(kwargs or {}))


def writes_of_commit(ledger: Ledger) -> int:
    """Commit, and return how many gradients were written."""
    with Writes(ledger) as writes:
        commit(ledger)
    count: int = writes.count
    return count


def _dense(param: Tensor) -> Tensor | None:
    grad = param.grad
    if grad is None:
        return None
    return (grad.coalesce().values() if grad.is_sparse else grad).double().clone()


def _times_rows(factors: Tensor, data: Tensor) -> Tensor:
    if data.ndim <= 1:
        return data * factors[0]
    for row, factor in zip(data, factors, strict=True):
        row.mul_(factor)
    return data


def _elements(data: Tensor | None) -> list[float]:
    return [] if data is None else data.reshape(-1).tolist()
