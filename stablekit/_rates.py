"""Learning rates lowered while an optimizer steps, and given back before anyone else sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


@final
class LentRates:
    """The learning rates of all groups of one optimizer, times a factor, for one step.

    A rate that is a tensor is replaced for the step, not written to: groups may share one.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        """Lend the rates."""
        self._lent: list[tuple[dict[str, Any], Any, Any, int]] = []
        for group in optimizer.param_groups:
            if "lr" in group:
                own, rate = group["lr"], group["lr"] * factor
                group["lr"] = rate
                self._lent.append((group, own, rate, _version(rate)))

    def give_back(self) -> None:
        """Put the rates back, except where a new one has come since."""
        for group, own, rate, version in self._lent:
            if group.get("lr") is rate and _version(rate) == version:
                group["lr"] = own
        self._lent = []


def _version(rate: Any) -> int:  # noqa: ANN401 - a number or a tensor
    return rate._version if isinstance(rate, Tensor) else 0
