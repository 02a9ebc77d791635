"""Values on their way to the host: at once on a CPU, in one copy every so often elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FULL = 4096


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

    def drop(self) -> None:
        """Forget what waits: it is about a run that is given up for a loaded one."""
        self._waiting = []

    @property
    def is_full(self) -> bool:
        """Whether so much waits that it should be read although nobody asked."""
        return len(self._waiting) >= _FULL

    def collect(self) -> None:
        """Read everything that waits in one copy and deliver it in order.

        A receiver that raises does not keep the later ones from their values: the first error comes
        out when all have been called. What is on the meta device has no value and is dropped.
        """
        waiting, self._waiting = self._waiting, []
        waiting = [(call, tensors) for call, tensors in waiting if not any(map(_is_meta, tensors))]
        values = iter(to_host([tensor for _, tensors in waiting for tensor in tensors]))
        letters = [(receive, [next(values) for _ in tensors]) for receive, tensors in waiting]
        errors: list[Exception] = []
        for receive, numbers in letters:
            try:
                receive(*numbers)
            except Exception as error:  # noqa: BLE001 - raised when all have been called
                errors.append(error)
        if errors:
            raise errors[0]


def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


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
