"""One call of a model's loss function: where its logits and targets are, and how it divides."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, final

from torch import Tensor, nn

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LossCall", "Shape", "shape_of"]


class Shape(NamedTuple):
    """What the arguments of a loss function mean."""

    name: str
    """Of the function."""
    parameters: tuple[str, ...]
    """Their names in order, since models pass some by position."""
    logits: str
    """Which of them are the logits."""
    shifts: bool
    """Whether row t of the logits is judged by label t + 1, as in causal language models."""


_LOGITS = {
    "ForCausalLMLoss": ("logits", True),
    "ForMaskedLMLoss": ("logits", False),
    "ForTokenClassification": ("logits", False),
    "ForSequenceClassificationLoss": ("pooled_logits", False),
}


def shape_of(function: Callable[..., Any]) -> Shape | None:
    """Return what the arguments of a loss function mean, None if that cannot be told.

    Known are those of transformers for causal and masked language models, and for classification of
    sequences, images and tokens; and any function of ``logits``, ``labels`` and ``shift_labels``,
    which is called like the first of these.

    Example:
        >>> def my_loss(logits, labels, shift_labels=None, **others): ...
        >>> shape_of(my_loss)
        Shape(name='my_loss', parameters=('logits', 'labels', 'shift_labels', 'others'), \
logits='logits', shifts=True)
        >>> shape_of(lambda start_logits, end_logits: None) is None
        True
    """
    name = getattr(function, "__name__", type(function).__name__)
    called = function.forward if isinstance(function, nn.Module) else function
    parameters = tuple(inspect.signature(called).parameters)
    if name in _LOGITS and {_LOGITS[name][0], "labels"} <= {*parameters}:
        return Shape(name, parameters, *_LOGITS[name])
    if {"logits", "labels", "shift_labels"} <= {*parameters}:
        return Shape(name, parameters, "logits", shifts=True)
    return None


@final
class LossCall:
    """What a model passed to its loss function, and the way on to the function itself.

    Attributes:
        logits: as the model made them, ``[..., classes]``; those of a sequence classifier are
            pooled, ``[batch, classes]``.
        ignore_index: rows with this target do not count.
        num_items: what the sum over rows is divided by, None for how many count in this call.
            Trainer gives the number of targets in all micro-batches of the step.
    """

    def __init__(
        self, shape: Shape, arguments: dict[str, Any], then: Callable[[dict[str, Any]], Tensor]
    ) -> None:
        """Take arguments by name and what is to be called with them."""
        self._shape, self._arguments, self._then = shape, arguments, then
        self.logits: Tensor = arguments[shape.logits]
        self.ignore_index: int = arguments.get("ignore_index", -100)
        self.num_items: Tensor | int | None = arguments.get("num_items_in_batch")

    def refuse_values(self, plugin: str) -> None:
        """Raise where the labels are no classes: a regression, or several labels a row.

        Raises:
            AttachError: They are not.
        """
        config = self._arguments.get("config")
        labels = self._given()
        is_single = getattr(config, "num_labels", 2) == 1
        kind = getattr(config, "problem_type", None) or "single_label_classification"
        if is_single or kind != "single_label_classification" or labels.is_floating_point():
            raise AttachError(
                f"{plugin} is about the softmax over classes, but {self._shape.name} got labels of"
                f" {labels.dtype} and is a regression or has several labels a row"
            )

    def _given(self) -> Tensor:
        labels: Tensor | None = self._arguments.get("labels")
        return self._arguments["shift_labels"] if labels is None else labels

    def targets(self) -> Tensor:
        """Return the class each row of the logits is judged by, of the shape of these rows."""
        shifted = self._arguments.get("shift_labels")
        if self._shape.shifts and shifted is not None:
            found: Tensor = shifted
        else:
            found = self._arguments["labels"]
            if self._shape.shifts:
                found = nn.functional.pad(found, (0, 1), value=self.ignore_index)[..., 1:]
        return found.to(self.logits.device).reshape(self.logits.shape[:-1])

    def loss(self, *, logits: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """Return the loss, of other logits or targets if given, of the same shape.

        A row is left out by the target ``ignore_index``.
        """
        arguments = dict(self._arguments)
        if logits is not None:
            arguments[self._shape.logits] = logits
        if targets is not None and self._shape.shifts:
            arguments["shift_labels"] = targets
        elif targets is not None:
            arguments["labels"] = targets.reshape(arguments["labels"].shape)
        return self._then(arguments)

    def share(self, total: Tensor, count: Tensor) -> Tensor:
        """Return a sum over rows, divided as the loss is.

        Args:
            total: the sum over the rows of this call that count.
            count: how many these are, for where ``num_items`` is None.
        """
        if self.num_items is None:
            return total / count.clamp(min=1)
        items = self.num_items
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def whole(self, loss: Tensor, count: Tensor) -> Tensor:
        """Return the sum over rows that a loss was before it was divided, detached.

        Args:
            loss: what :meth:`loss` returned.
            count: how many rows of this call count.
        """
        items = count if self.num_items is None else self.num_items
        loss = loss.detach()
        return loss * (items.to(loss.device) if isinstance(items, Tensor) else items)
