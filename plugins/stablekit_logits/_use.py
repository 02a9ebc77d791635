"""Whether training goes through a door: never is an error, no longer is an event."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from stablekit import Step
    from stablekit.forward import Sampling

__all__ = ["Use"]

_ASLEEP = (
    "the model is in eval mode, as from_pretrained returns it and a validation leaves it: call"
    " model.train()"
)


@final
class Use:
    """What a door saw since the last step, in Python: a compiled forward pass only sets flags.

    Args:
        plugin: the name of who asks.
    """

    def __init__(self, plugin: str) -> None:
        """Know nothing yet."""
        self.plugin = plugin
        self.start()

    def start(self) -> None:
        """Begin a session."""
        self._is_used = self._is_asleep = self._was_ever = self._is_missed = False

    def looks(self, sampling: Sampling, module: nn.Module, *, at_all_times: bool = False) -> bool:
        """Tell whether a module now computes for a training batch, and remember it.

        Args:
            sampling: of the door.
            module: what computes.
            at_all_times: count a module in eval mode too, because the method acts there.
        """
        if sampling.looks_at(module):
            self._is_used = True
            return True
        session = sampling.session
        if torch.is_grad_enabled() and session is not None and not session.is_paused:
            if at_all_times:
                self._is_used = True
            else:
                self._is_asleep = True
        return False

    def check(self, step: Step, module: nn.Module, where: str, why: Callable[[], str]) -> None:
        """Raise in the first step that did not use the door; after one that did, emit "inactive".

        "active" is emitted in the step that uses it again.

        Args:
            step: the present one.
            module: what the door is on.
            where: in words.
            why: says what may be the matter if the module is in training mode.

        Raises:
            AttachError: No step used it yet; training would not be what was asked for.
        """
        is_used, is_asleep = self._is_used, self._is_asleep or not module.training
        self._is_used = self._is_asleep = False
        if is_used:
            if self._is_missed:
                step.emit("active", f"{self.plugin} acts again on {where}")
            self._was_ever, self._is_missed = True, False
            return
        reason = _ASLEEP if is_asleep else why()
        if not self._was_ever:
            raise AttachError(
                f"{self.plugin} is on {where}, and the first training step did not call it"
                f"{' in training mode' if is_asleep else ''}: {reason}"
            )
        if not self._is_missed:
            step.emit(
                "inactive", f"{self.plugin} acts no more: a step did not call {where}: {reason}"
            )
        self._is_missed = True
