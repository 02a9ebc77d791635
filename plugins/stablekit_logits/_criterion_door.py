"""The way onto a cross-entropy that is a module, ``nn.CrossEntropyLoss``, and off it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import Sampling, modules
from stablekit_logits._loss_call import LossCall, Shape
from stablekit_logits._tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session

__all__ = ["CriterionDoor"]

_SHAPE = Shape("CrossEntropyLoss", ("logits", "labels"), "logits", shifts=False)


@final
class CriterionDoor:
    """Calls a function around a module that computes the mean cross-entropy, in training only.

    What the :class:`~stablekit_logits._loss_door.LossDoor` says of its function holds for this one.

    Args:
        plugin: the name of who asks.
        metrics: names of the columns of ``tally``.
        on: name of the module.
        around: gets a :class:`LossCall` and returns the loss.
    """

    def __init__(
        self, plugin: str, *metrics: str, on: str, around: Callable[[LossCall], Tensor]
    ) -> None:
        """Keep it closed."""
        self.plugin, self.on, self.around = plugin, on, around
        self.tally = Tally(*metrics)
        self.was_used = False
        self._session: Session | None = None
        self._sampling = Sampling(every=1)
        self._handles: list[Any] = []

    def open(self, session: Session) -> None:
        """Listen to the module.

        Raises:
            AttachError: There is no model, or no such module, or not one of this kind.
        """
        model = modules.model_of(session, self.plugin)
        for name, module in modules.matching(model, self.on, argument="on").items():
            _refuse_others(module, name, self.plugin)
            self._handles.append(module.register_forward_hook(self._see))
        self._session, self.was_used = session, False
        self._sampling.attach(session)
        self.tally.open(session, modules.device_of(model))

    def close(self) -> None:
        """Take the hook away."""
        for handle in self._handles:
            handle.remove()
        self._sampling.detach()
        self.tally.close()
        self._handles, self._session = [], None

    def check(self) -> None:
        """Raise if no loss was computed here since the door was opened: call it in every step.

        Raises:
            AttachError: None was.
        """
        if self._session is not None and not self.was_used:
            raise AttachError(
                f"{self.plugin} is on the loss {self.on!r}, and the first training step did not"
                " call it: is the model that was attached the one that is trained?"
            )

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._session is None or not self._sampling.looks_at(module):
            return output
        self.was_used = True
        assert isinstance(module, nn.CrossEntropyLoss)
        call = _call_of(module, inputs, output, self.plugin)
        if not self._session.dry_run:
            return self.around(call)
        with torch.no_grad():
            self.around(call)
        return output


def _call_of(
    module: nn.CrossEntropyLoss, inputs: tuple[Any, ...], output: Tensor, plugin: str
) -> LossCall:
    ignored = module.ignore_index
    if len(inputs) != 2 or inputs[0].ndim != 2 or inputs[1].is_floating_point():
        raise AttachError(
            f"{plugin} takes a loss called with logits [rows, classes] and integer labels [rows],"
            f" by position; got {[list(one.shape) for one in inputs]}"
        )

    def then(arguments: dict[str, Any]) -> Tensor:
        if arguments["labels"] is inputs[1]:
            return output
        return nn.functional.cross_entropy(
            arguments["logits"],
            arguments["labels"],
            ignore_index=ignored,
            label_smoothing=module.label_smoothing,
        )

    given = {"logits": inputs[0], "labels": inputs[1], "ignore_index": ignored}
    return LossCall(_SHAPE, given, then)


def _refuse_others(module: nn.Module, name: str, plugin: str) -> None:
    if not isinstance(module, nn.CrossEntropyLoss):
        raise AttachError(
            f"{plugin}: on={name!r} is a {type(module).__name__}; it takes an nn.CrossEntropyLoss"
        )
    if module.reduction != "mean" or module.weight is not None:
        raise AttachError(
            f"{plugin} takes an nn.CrossEntropyLoss with reduction='mean' and without class"
            f" weights, got {module}; use ErrorNormLoss in its place"
        )
