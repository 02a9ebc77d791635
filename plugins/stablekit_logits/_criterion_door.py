"""The way onto a cross-entropy that is a module, ``nn.CrossEntropyLoss``, and off it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import Sampling, modules
from stablekit_logits._doors_on import refuse_second
from stablekit_logits._loss_call import LossCall, Shape
from stablekit_logits._tally import Tally
from stablekit_logits._use import Use

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session, Step

__all__ = ["CriterionDoor"]

_WHY = "is the model that was attached the one that is trained?"
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
        self.session: Session | None = None
        self._use = Use(plugin)
        self._loss: nn.Module | None = None
        self._sampling = Sampling(every=1)
        self._handles: list[Any] = []

    def open(self, session: Session) -> None:
        """Listen to the module.

        Raises:
            AttachError: There is no model, or no such module, or not one of this kind, or this
                plugin acts on the model for another session.
        """
        model = modules.model_of(session, self.plugin)
        refuse_second(session, self.plugin)
        found = modules.matching(model, self.on, argument="on")
        for name, module in found.items():
            _refuse_others(module, name, self.plugin)
        for module in found.values():
            self._handles.append(module.register_forward_hook(_Hook(self)))
            self._loss = module
        self.session = session
        self._use.start()
        self._sampling.attach(session)
        self.tally.open(session, modules.device_of(model))

    def close(self, session: Session) -> None:
        """Take the hook away, if it is open for a session."""
        if self.session is not session:
            return
        for handle in self._handles:
            handle.remove()
        self._sampling.detach()
        self.tally.close()
        self._handles, self._loss, self.session = [], None, None

    def check(self, step: Step) -> None:
        """Raise if no step computed its loss here yet, tell of the first that no longer did.

        Raises:
            AttachError: None did.
        """
        if self._loss is not None:
            self._use.check(step, self._loss, f"the loss {self.on!r}", lambda: _WHY)

    def pass_on(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Call ``around`` in training; in a dry run its result is dropped."""
        if self.session is None or not self._use.looks(self._sampling, module):
            return output
        assert isinstance(module, nn.CrossEntropyLoss)
        call = _call_of(module, inputs, output, self.plugin)
        if not self.session.dry_run:
            return self.around(call)
        with torch.no_grad():
            self.around(call)
        return output


@final
class _Hook:
    """The forward hook; in a copy of the model it does nothing."""

    def __init__(self, door: CriterionDoor | None) -> None:
        self.door = door

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self.door is None else self.door.pass_on(module, inputs, output)

    def doors_open(self) -> list[tuple[str, Session]]:
        """Return the plugin that acts here and its session, none in a copied model."""
        session = None if self.door is None else self.door.session
        return [] if self.door is None or session is None else [(self.door.plugin, session)]

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


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
    others = {
        f"reduction={module.reduction!r}": module.reduction != "mean",
        "class weights (weight=)": module.weight is not None,
    }
    if any(others.values()):
        found = " and ".join(words for words, has in others.items() if has)
        raise AttachError(
            f"{plugin} takes an nn.CrossEntropyLoss with reduction='mean' and without class"
            f" weights; {name!r} has {found}. Use stablekit_logits.ErrorNormLoss in its place"
        )
