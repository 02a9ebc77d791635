"""The small operations: how many, and their bytes, as linear forms in tensors and units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from benchmarks.scaling.sizes import Held


@final
@dataclass(frozen=True)
class Linear:
    """A number plus one a vector, one a matrix and one an output unit.

    Example:
        >>> (Linear(1, tensor=2) + Linear(unit=3)).at(vectors=10, matrices=5, units=7)
        52
    """

    once: float = 0
    tensor: float = 0
    """A tensor, vector or matrix."""
    vector: float = 0
    """A vector, on top."""
    matrix: float = 0
    """A matrix, on top."""
    unit: float = 0

    def at(self, vectors: int, matrices: int, units: int) -> float:
        """Return the number."""
        tensors = self.tensor * (vectors + matrices)
        own = self.vector * vectors + self.matrix * matrices
        return self.once + tensors + own + self.unit * units

    def of(self, held: Held) -> float:
        """Return the number for what a rank holds."""
        return self.at(held.vectors, held.matrices, held.units)

    def __add__(self, other: Linear) -> Linear:
        """Return the sum."""
        return Linear(
            self.once + other.once,
            self.tensor + other.tensor,
            self.vector + other.vector,
            self.matrix + other.matrix,
            self.unit + other.unit,
        )

    def times(self, share: float) -> Linear:
        """Return a share of it."""
        values = (self.once, self.tensor, self.vector, self.matrix, self.unit)
        return Linear(*(share * value for value in values))


ZERO = Linear()


@final
@dataclass(frozen=True)
class Small:
    """Operations on numbers, on one value a tensor and on one a unit.

    Args:
        kernels: how many.
        bytes: what they read and write.
    """

    kernels: Linear = ZERO
    bytes: Linear = ZERO

    def __add__(self, other: Small) -> Small:
        """Return the sum."""
        return Small(self.kernels + other.kernels, self.bytes + other.bytes)

    def times(self, share: float) -> Small:
        """Return what it costs if it is not done in every step."""
        return Small(self.kernels.times(share), self.bytes.times(share))


NOTHING = Small()
