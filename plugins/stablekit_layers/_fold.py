"""Computing surgeries into the plain model's weights, where that is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from torch import nn

from stablekit.errors import AttachError
from stablekit_layers import _marks
from stablekit_layers.surgery import Foldable

if TYPE_CHECKING:
    from stablekit_layers.surgery import Surgery

__all__ = ["fold"]

Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model, *names: str) -> Model:
    """Make a trained model plain again where its weights can hold what surgeries added, in place.

    What the model computes stays the same: bit for bit with weight standardisation, up to the
    rounding of one product in each weight with the gains of heads. Parameters are removed, so an
    optimizer made before does not fit any more.

    Args:
        model: what was operated on.
        names: of the surgeries to fold; none is all there are.

    Returns:
        The same model. With nothing else on it, it is a plain one: ``save_pretrained`` writes what
        ``from_pretrained`` of its class reads.

    Raises:
        AttachError: One of them cannot be folded, or is not on the model, or the model is sharded.
            Nothing was changed.

    Example:
        >>> import torch
        >>> import stablekit_layers
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = stablekit_layers.apply(model, stablekit_layers.ScaledWeightStandardization())
        >>> before = model(torch.ones(4))
        >>> _ = stablekit_layers.fold(model)
        >>> list(model.state_dict()), torch.equal(model(torch.ones(4)), before)
        (['0.weight', '0.bias'], True)
    """
    inner = _marks.bare(model)
    if any(hasattr(param, "full_tensor") for param in inner.parameters()):
        raise AttachError(
            "the parameters of this model are sharded: save it, and fold it after"
            " stablekit_layers.load"
        )
    # Gains go into a weight that a layer holds: those that compute weights are folded before them.
    chosen = sorted(_chosen(inner, names), key=lambda one: not hasattr(one, "computes_weights"))
    for surgery in chosen:
        _check(surgery, inner)
    for surgery in chosen:
        cast("Foldable", surgery).fold(inner)
        _marks.unmark(inner, surgery.name)
    return model


def _chosen(model: nn.Module, names: tuple[str, ...]) -> list[Surgery]:
    made = {surgery.name: surgery for surgery in _marks.applied(model)}
    missing = [name for name in names if name not in made]
    if missing:
        found = ", ".join(made) or "none"
        raise AttachError(f"{missing[0]} is not on this model; surgeries found: {found}")
    return [made[name] for name in names or made]


def _check(surgery: Surgery, model: nn.Module) -> None:
    if not isinstance(surgery, Foldable):
        raise AttachError(f"{surgery.name} cannot be folded: no weight computes the same")
    if hasattr(surgery, "check_fold"):
        surgery.check_fold(model)
