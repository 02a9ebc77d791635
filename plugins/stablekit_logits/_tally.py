"""What a plugin saw in the forward passes of a step, kept on the device until the step ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit.forward import Sampling, Slots

if TYPE_CHECKING:
    from stablekit import Session, Step

__all__ = ["Tally"]


@final
class Tally:
    """Means over all rows of all micro-batches of a step and all ranks, recorded as metrics.

    Nothing here reads a tensor on the host. The means are agreed on in one reduction a step.

    Args:
        names: of the metrics.
    """

    def __init__(self, *names: str) -> None:
        """Start closed."""
        self.names = names
        self._slots: Slots | None = None

    def open(self, session: Session, device: torch.device) -> None:
        """Make an empty table."""
        sampling = Sampling(every=1)
        sampling.attach(session)
        self._slots = Slots(sampling, 1, sums=1 + len(self.names), device=device)

    def add(self, count: Tensor, *sums: Tensor) -> None:
        """Add what a forward pass showed: how many rows, and for each name the sum over them."""
        if self._slots is not None:
            with torch.no_grad():
                row = torch.stack([one.detach().to(torch.float32) for one in (count, *sums)])
                self._slots.put(0, row)

    def record(self, step: Step) -> None:
        """Record the means since the last call, NaN if there was no row."""
        if self._slots is not None:
            count, *sums = self._slots.take(reduce=True)[0].unbind()
            for name, total in zip(self.names, sums, strict=True):
                step.record(name, (total / count).float())

    def close(self) -> None:
        """Let the table go."""
        self._slots = None
