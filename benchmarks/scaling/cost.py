"""What a step costs, in bytes and numbers: the words in which the model speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

FLOAT = 4
"""Bytes of what is reduced and kept: float32."""


@final
@dataclass(frozen=True)
class Reduction:
    """One all-reduce: over these ways of :class:`~benchmarks.scaling.sizes.Mesh` at once."""

    over: tuple[str, ...]
    payload: int
    """Bytes on each rank."""


@final
@dataclass(frozen=True)
class Cost:
    """What one step costs one rank on top of the optimizer."""

    reductions: tuple[Reduction, ...] = ()
    reads: float = 0
    """Values read on the host a step: each makes an accelerator wait."""
    passes: float = 0
    """How often the local gradients, or weights, are read or written in full."""
    stored: float = 0
    """Of these, writes inside a fused optimizer's kernel, which scales what it reads anyway."""
    bytes: float = 0
    """All bytes read and written, the kernel's aside."""
    kernels: float = 0
    """Operations outside of the optimizer's, each at least one kernel."""
    kernels_once: float = 0
    """Of these, how many there are whatever the number of tensors."""
    each: float = 0
    """Kernels of an accelerator where a multi-tensor operation has a factor for each tensor."""
    batched: float = 0
    """Operations over all tensors that an accelerator runs in batches of tensors."""
    held: float = 0
    """Bytes kept from step to step."""
    temporary: float = 0
    """Most bytes that live within a step only."""

    @property
    def payload(self) -> int:
        """Bytes handed to reductions."""
        return sum(reduction.payload for reduction in self.reductions)
