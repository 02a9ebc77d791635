"""Parameters of one element each, whose gradients are the recorded norms of whole tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

import stablekit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from stablekit import Session

__all__ = ["Still", "attach_to_nothing"]


@final
class Still(torch.optim.Optimizer):
    """An optimizer over one element a tensor that leaves all of them where they are.

    The norm of a gradient of one element is that element, to the last bit, so that plugins read
    from these parameters what was recorded of the real ones.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Make the parameters, with these names."""
        self._flat = torch.zeros(len(names))
        self._gradients = self._flat.split(1)
        self._parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
        self._present: NDArray[Any] | None = None
        super().__init__(list(zip(names, self._parameters, strict=True)), {"lr": 0.0})

    def show(self, norms: NDArray[Any], present: NDArray[Any], lr: float) -> None:
        """Put the norms of one step where backward would have put the gradients."""
        self._flat.copy_(torch.from_numpy(norms))
        self.param_groups[0]["lr"] = lr
        if self._present is not None and (present == self._present).all():
            return
        self._present = present
        for param, grad, is_there in zip(self._parameters, self._gradients, present, strict=True):
            param.grad = grad if is_there else None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do nothing."""


def attach_to_nothing(names: Sequence[str], specs: Iterable[Any]) -> tuple[Still, Session]:
    """Attach plugins to an optimizer that stands still.

    In a dry run: they decide and report, and nothing of what they decide changes the record.
    """
    optimizer = Still(names)
    return optimizer, stablekit.attach(optimizer, *specs, dry_run=True, device_mode=False)
