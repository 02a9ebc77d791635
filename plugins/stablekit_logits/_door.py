"""Which door a plugin goes through: the model's loss function, or a module's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit_logits._loss_call import LossCall
from stablekit_logits._loss_door import LossDoor
from stablekit_logits._output_door import OutputDoor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Door", "LossCall", "LossDoor", "OutputDoor", "door"]

Door = LossDoor | OutputDoor
"""Both have ``open(session)``, ``check(step)``, ``tally.record(step)`` and ``close(session)``."""


def door(
    plugin: str,
    *metrics: str,
    on: str | None,
    around: Callable[[LossCall], Tensor],
    through: Callable[[Tensor], Tensor],
    instead: str,
) -> Door:
    """Return the loss function's door, or that of the module named.

    Args:
        plugin: the name of who asks.
        metrics: names of what it puts into ``tally``.
        on: name of a module; None is the loss function.
        around: computes the loss, see :class:`LossDoor`.
        through: computes what goes on in place of the logits, see :class:`OutputDoor`.
        instead: what else can be done, see :class:`LossDoor`.
    """
    if on is None:
        return LossDoor(plugin, *metrics, around=around, instead=instead)
    return OutputDoor(plugin, *metrics, on=on, through=through)
