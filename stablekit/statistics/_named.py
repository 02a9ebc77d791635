"""Values of parameters, kept while parameters come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.statistics._saved import rows_of, scalar_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@final
class NamedValues:
    """A row of values for each parameter, kept by name while parameters come and go.

    Example:
        >>> import math
        >>> values = NamedValues(default=math.inf)
        >>> values.align(("a", "b"), torch.device("cpu"))
        tensor([inf, inf])
        >>> values.set(torch.tensor([1.0, 2.0]))
        >>> values.align(("b", "c"), torch.device("cpu"))
        tensor([2., inf])
        >>> values.state_dict()
        {'a': 1.0, 'b': 2.0}
    """

    def __init__(self, *, default: float, shape: tuple[int, ...] = ()) -> None:
        """Start without names; a new name starts at the default."""
        self.default = default
        self.shape = shape
        self._names: tuple[str, ...] = ()
        self._rows = torch.full((0, *shape), default)
        self._parked: dict[str, Tensor] = {}

    def align(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the rows of these names, ``[len(names), *shape]``."""
        if names is not self._names and tuple(names) != self._names:
            self._parked.update(zip(self._names, self._rows.unbind(), strict=True))
            fresh = torch.full(self.shape, self.default, device=device)
            rows = [self._parked.pop(name, fresh).to(device) for name in names]
            self._rows = torch.stack(rows) if rows else fresh.new_full((0, *self.shape), 0.0)
        self._names = tuple(names)
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows

    def set(self, rows: Tensor) -> None:
        """Replace the rows of the names last aligned to."""
        self._rows = rows

    def widen(self, length: int) -> None:
        """Make rows that are vectors this long, with the default at their end; reads no value."""
        more = (length - self.shape[0],)
        self.shape = (length,)
        self._rows = torch.cat(
            [self._rows, self._rows.new_full((len(self._rows), *more), self.default)], 1
        )
        self._parked = {
            name: torch.cat([row, row.new_full(more, self.default)])
            for name, row in self._parked.items()
        }

    def rows(self) -> dict[str, Tensor]:
        """Return name -> row on the CPU."""
        current = zip(self._names, self._rows.cpu().unbind(), strict=True)
        return {**{name: row.cpu() for name, row in self._parked.items()}, **dict(current)}

    def replace(self, rows: Mapping[str, Tensor]) -> None:
        """Forget all names and continue from these rows."""
        self._names, self._rows = (), torch.full((0, *self.shape), self.default)
        self._parked = dict(rows)

    def state_dict(self) -> dict[str, float]:
        """Return name -> number, of the names that are no longer at the default."""
        numbers = {name: float(row) for name, row in self.rows().items()}
        return {name: value for name, value in numbers.items() if value != self.default}

    def load_state_dict(self, state: Mapping[str, Any], *, field: str) -> None:
        """Continue from saved numbers.

        Args:
            state: what :meth:`state_dict` returned.
            field: what an error message calls it.

        Raises:
            TypeError: It is not a mapping from names to numbers.
            ValueError: A number is not finite, or is negative.
        """
        saved = rows_of(field, state)
        self.replace(
            {name: scalar_of(f"{field}[{name!r}]", saved[name], at_least=0) for name in saved}
        )
