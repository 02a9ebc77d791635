"""Values on their way to the host: at once on a CPU, in one copy every so often elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@final
class Mail:
    """Calls that wait for values of tensors."""

    def __init__(self, *, host: bool) -> None:
        """Deliver at once if the host may be read at any time."""
        self.host = host
        self._waiting: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []

    def send(self, receive: Callable[..., None], *tensors: Tensor) -> None:
        """Have ``receive`` called with the values of the tensors, now or at the next collection."""
        if self.host:
            receive(*(tensor.tolist() for tensor in tensors))
        else:
            self._waiting.append((receive, tuple(tensor.detach() for tensor in tensors)))

    def collect(self) -> None:
        """Read everything that waits in one copy and deliver it in order."""
        waiting, self._waiting = self._waiting, []
        values = iter(to_host([tensor for _, tensors in waiting for tensor in tensors]))
        for receive, tensors in waiting:
            receive(*(next(values) for _ in tensors))


def to_host(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the values of tensors as numbers or lists, with one copy to the host for all.

    Tensors on the meta device hold no values; they read as NaN.
    """
    if not tensors:
        return []
    home = tensors[0].device
    flat = [
        t.reshape(-1).to(home, torch.float64 if home.type == "cpu" else torch.float32)
        for t in tensors
    ]
    joined = torch.cat(flat)
    values = [float("nan")] * joined.numel() if joined.is_meta else joined.tolist()
    result, start = [], 0
    for tensor in tensors:
        piece = values[start : start + tensor.numel()]
        start += tensor.numel()
        result.append(piece[0] if tensor.ndim == 0 else piece)
    return result
