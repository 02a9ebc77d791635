"""Two modules whose outputs in one forward pass are looked at together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.forward import modules

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from stablekit.forward import Slots

__all__ = ["Pairing"]


@final
class Pairing:
    """Holds the output that came first until the other one comes."""

    def __init__(self, slots: Slots, look: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Put what ``look`` makes of two outputs in the first slot."""
        self.slots = slots
        self.look = look
        self._held: dict[int, Tensor] = {}

    def see(self, place: int, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - any module's
        """Take the output of the module at place 0 or 1."""
        if not self.slots.sampling.looks_at(module):
            return
        tensors = modules.tensors_in(output)
        if not tensors:
            return
        self._held[place] = modules.whole(tensors[0])
        if len(self._held) == 2:
            with torch.no_grad():
                row = self.look(self._held[0], self._held[1])
            self._held = {}
            if row is not None:
                self.slots.put(0, row)

    def __reduce__(self) -> tuple[type[Pairing], tuple[Any, ...]]:
        """Copy and pickle without what is held."""
        return Pairing, (self.slots, self.look)
