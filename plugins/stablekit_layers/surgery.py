"""What a surgery is: a change of a model's layers that is made before its optimizer exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["GROUP", "Foldable", "Surgery"]

GROUP = "stablekit.surgery"
"""The entry-point group: name -> class. A third party's surgery is listed by naming it there."""


@runtime_checkable
class Surgery(Protocol):
    """What ``stablekit_layers.apply`` needs of a surgery.

    The two methods are called one after the other, ``check`` of every surgery before the first
    ``apply_to``, so that nothing is changed when one of them refuses. What is added has to survive
    ``copy.deepcopy``, pickling and ``torch.compile``: modules, and hooks that are functions of
    a module or objects with ``__call__``, not closures.

    Example:
        >>> from stablekit_layers import QKNorm
        >>> isinstance(QKNorm(), Surgery)
        True
    """

    name: str
    """Name in the catalogue, in a checkpoint's configuration and in messages."""
    conflicts: frozenset[str]
    """Names of surgeries that cannot be on the same model; one of two need name the other."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Constructor arguments that make an equal surgery: plain values that JSON can hold."""

    def check(self, model: nn.Module) -> None:
        """Raise ``stablekit.errors.AttachError`` if the model cannot be operated on."""

    def apply_to(self, model: nn.Module) -> None:
        """Change the model in place; new parameters on device and in dtype of those next to them.

        Under ``torch.device("meta")``, or in ``from_pretrained``, parameters have no values yet.
        """


@runtime_checkable
class Foldable(Protocol):
    """A surgery that can be computed into the plain model's weights, exactly.

    Optional are ``check_fold(model)``, which raises before anything changes if this one cannot be
    folded, and an attribute ``computes_weights`` for those that make the weights which others fold
    into: they are folded first.
    """

    def fold(self, model: nn.Module) -> None:
        """Change weights so that the plain model computes the same, and remove what was added."""
