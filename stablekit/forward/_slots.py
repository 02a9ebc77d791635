"""A few numbers for each watched module, kept on its device until the step ends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.forward._sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Slots", "largest"]


@final
class Slots:
    """A table with one row for each module: sums, which add up, then peaks, of which the largest.

    Written in place through ``.data``: a compiled graph then has the table as an input and nothing
    to guard, and gradient checkpointing, which compares versions of the inputs it kept, is not
    disturbed. Ratios of sums, and peaks, are the same if a forward pass is computed twice.

    Args:
        sampling: says when to look.
        rows: how many modules there are.
        sums: how many numbers of each add up.
        peaks: how many are kept where they are the largest.
        device: where the table is.

    Example:
        >>> slots = Slots(Sampling(every=1), 1, sums=1, peaks=1, device=torch.device("cpu"))
        >>> slots.put(0, torch.tensor([2.0, 5.0]))
        >>> slots.put(0, torch.tensor([3.0, 4.0]))
        >>> slots.take(reduce=False).tolist()
        [[5.0, 5.0]]
    """

    def __init__(
        self, sampling: Sampling, rows: int, *, sums: int = 0, peaks: int = 0, device: torch.device
    ) -> None:
        """Make an empty table."""
        self.sampling = sampling
        self._sums = sums
        # In float64 the sum of some float32 numbers is the same in every order, so over ranks too.
        exact = sums > 0 and device.type != "mps"
        kind = torch.float64 if exact else torch.float32
        row = [0.0] * sums + [-torch.inf] * peaks
        self._empty = torch.tensor(row, dtype=kind, device=device)
        self.table = self._empty.repeat(rows, 1)

    def watch(self, slot: int, module: nn.Module, look: Callable[[Any], Tensor | None]) -> None:
        """Keep what ``look`` makes of a module's output, a row of the table or None, in a slot."""
        self.sampling.after(module, partial(self._see, slot, look))

    def _see(
        self,
        slot: int,
        look: Callable[[Any], Tensor | None],
        module: nn.Module,
        inputs: Any,  # noqa: ANN401 - any module's
        output: Any,  # noqa: ANN401 - any module's
    ) -> None:
        if self.sampling.looks_at(module):
            with torch.no_grad():
                row = look(output)
                if row is not None:
                    self.put(slot, row)

    def row(self) -> Tensor:
        """Return a row that adds nothing."""
        return self._empty.clone()

    def put(self, slot: int, row: Tensor) -> None:
        """Add a row to what a slot holds."""
        held, row = self.table.data[slot], row.to(self.table.device)
        held[: self._sums].add_(row[: self._sums])
        held[self._sums :].copy_(torch.maximum(held[self._sums :], row[self._sums :]))

    def take(self, *, reduce: bool) -> Tensor:
        """Return the table, over all ranks if asked to, and start an empty one.

        A peak that is NaN comes out infinite: of NaN and a number the larger one depends on the
        backend.
        """
        table = self.table.clone()
        self.clear()
        sums, peaks = table[:, : self._sums], table[:, self._sums :]
        peaks = peaks.nan_to_num(torch.inf, torch.inf, -torch.inf)
        session = self.sampling.session
        if reduce and session is not None:
            sums = session.reduce(sums.contiguous(), "sum") if sums.numel() else sums
            peaks = session.reduce(peaks, "max") if peaks.numel() else peaks
        return torch.cat([sums, peaks], dim=1)

    def clear(self) -> None:
        """Start an empty table."""
        self.table.data.copy_(self._empty.expand_as(self.table))

    def __reduce__(self) -> tuple[Callable[..., Slots], tuple[Any, ...]]:
        """Copy and pickle as a table that nothing is written to: a copied model is not watched."""
        rows, width = self.table.shape
        make = partial(Slots, sums=self._sums, peaks=width - self._sums, device=torch.device("cpu"))
        return make, (Sampling(self.sampling.every), rows)


def largest(values: Tensor, seen: Tensor) -> Tensor:
    """Return the largest of the values that were seen, NaN if one is NaN or none was seen.

    Example:
        >>> largest(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        tensor(1.)
    """
    among = torch.where(seen, values, -torch.inf).amax()
    return torch.where(seen.any(), among, torch.nan)
