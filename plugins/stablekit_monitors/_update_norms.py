"""How far a step moves the parameters, measured from a copy of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stablekit import Step


@final
class UpdateNorms:
    """Copies the parameters before a step and measures the difference after it."""

    def __init__(self) -> None:
        """Start without a copy."""
        self._before: list[Tensor] = []

    def begin(self, step: Step) -> None:
        """Copy the parameters."""
        self._before = [param.detach().clone() for param in step.parameters]

    @torch.no_grad()
    def end(self, step: Step) -> Tensor | None:
        """Return the L2 norm of what the step added to each, ``[P]``; None if none was copied."""
        before, self._before = self._before, []
        if len(before) != len(step.parameters) or not before:
            return None
        for old, new in zip(before, step.parameters, strict=True):
            old.sub_(new)
        return step.norms_of(before)
