"""Rows on their way to a file: kept where they are made, read on the host in one copy for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from stablekit_monitors._record.chunk import Chunk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Gradients
    from stablekit.scalars import Scalar
    from stablekit_monitors._record.chunk import Doubles, Ints

OK = "ok"
"""The value of a row that is not a metric: whether the step was not skipped."""

# Stands for the norm of a gradient that is not there.
_ABSENT = -1.0


@final
class Buffer:
    """Rows of the same tensors.

    Args:
        gradients: of the first step; they say which tensors.
        columns: the positions of the tensors in the run.
        rows: how many rows there is room for.
        stride: how many steps each row stands for.
    """

    def __init__(self, gradients: Gradients, columns: Ints, *, rows: int, stride: int) -> None:
        """Make room on the device of the gradients."""
        self.names = gradients.names
        self._columns = columns
        self._stride = stride
        self._device = gradients.device
        self._norms = torch.empty((rows, len(self.names)), device=self._device)
        self._absent = torch.full((), _ABSENT, device=self._device)
        self._steps: list[int] = []
        self._known: list[dict[str, float]] = []
        self._late: list[tuple[tuple[str, ...], Tensor | None]] = []

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._steps)

    def add(self, number: int, gradients: Gradients, values: Mapping[str, Scalar]) -> None:
        """Add a row in a few small operations, none of which waits for the device."""
        row = self._norms[len(self._steps)]
        torch.where(gradients.present, gradients.raw_norms(), self._absent, out=row)
        late = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        stacked = torch.stack([self._here(value) for value in late.values()]) if late else None
        self._late.append((tuple(late), stacked))
        self._known.append({k: v for k, v in values.items() if not isinstance(v, Tensor)})
        self._steps.append(number)

    def take(self) -> Chunk:
        """Return all rows and begin again with none; the one moment that waits for the device."""
        norms = _on_host(self._norms[: len(self._steps)])
        keys, scalars = _table(self._values())
        is_key = np.array([key != OK for key in keys])
        chunk = Chunk(
            steps=np.array(self._steps, np.int64),
            stride=np.full(len(self._steps), self._stride, np.int64),
            ok=scalars[:, keys.index(OK)] != 0,
            keys=tuple(key for key in keys if key != OK),
            scalars=scalars[:, is_key],
            norms=np.where(norms < 0, 0, norms).astype(np.float32),
            present=~(norms < 0),
            columns=self._columns,
        )
        self._steps, self._known, self._late = [], [], []
        return chunk

    def _values(self) -> list[dict[str, float]]:
        """Return the values of each row, after one copy to the host for all of them."""
        stacked = [values for _, values in self._late if values is not None]
        if not stacked:
            return self._known
        read = iter(_on_host(torch.cat(stacked)).tolist())
        return [
            {**known, **{name: next(read) for name in names}}
            for known, (names, _) in zip(self._known, self._late, strict=True)
        ]

    def _here(self, value: Tensor) -> Tensor:
        is_here = value.device == self._device and value.ndim == 0
        return value if is_here else value.reshape(()).to(self._device, non_blocking=True)


def _table(rows: list[dict[str, float]]) -> tuple[list[str], Doubles]:
    """Put rows in one table, NaN where a row does not have a key."""
    by_keys: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_keys.setdefault(tuple(row), []).append(i)
    places = {key: i for i, key in enumerate(dict.fromkeys(k for keys in by_keys for k in keys))}
    table = np.full((len(rows), len(places)), np.nan)
    for keys, members in by_keys.items():
        values = np.array([[*rows[i].values()] for i in members])
        table[np.ix_(members, [places[key] for key in keys])] = values
    return list(places), table


def _on_host(tensor: Tensor) -> Doubles:
    """Return values as float64; tensors on the meta device hold none and read as NaN."""
    if tensor.is_meta:
        return np.full(tensor.shape, np.nan)
    values: Doubles = tensor.cpu().double().numpy()
    return values
