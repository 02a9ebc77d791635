"""What a workload of the demo provides: model, optimizer, batches in a fixed order, a measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

__all__ = ["Facts", "Workload"]


@dataclass(frozen=True)
class Facts:
    """What is fixed about a workload and printed with every result."""

    name: str
    title: str
    """What is trained, on what, with which optimizer: one line."""
    data: str
    """The data, frozen: counts and a hash."""
    unit: str
    """Unit of the losses."""
    steps: int
    """Number of steps unless the user says otherwise."""
    settled: float
    """Fraction of the run after which a high loss counts as damage rather than as a start."""
    injected_tensor: str
    """Name of the parameter whose gradient gets the injected NaN."""
    high_loss: float | None = None
    """Training losses above this are counted; None where only the worst is of interest."""
    keywords: Mapping[str, str] = field(default_factory=dict)
    """What plugins that look at modules are told of this model, unless the user says otherwise."""


class Workload(Protocol):
    """A training job that can be started over and over from the same initial state."""

    facts: Facts

    def model(self) -> nn.Module:
        """Build the model; the caller has seeded torch."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of the workload, without any protection."""

    def loss(self, model: nn.Module, order: torch.Generator) -> torch.Tensor:
        """Draw the next batch with ``order`` and return its training loss."""

    def held_out(self, model: nn.Module) -> float:
        """Return the mean loss on clean data that is never trained on; always the same data."""
