"""Finding the doors that are open on a model, and the sessions they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit.errors import AttachError
from stablekit.forward import modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from stablekit import Session

__all__ = ["LOSS", "refuse_second", "sessions_on"]

LOSS = "_loss_function"
"""The attribute that models of transformers keep a loss function of their own in."""


def sessions_on(model: nn.Module) -> list[Session]:
    """Return the sessions whose plugins of this package act on a model, or on a module in it.

    For a notebook in which a session was lost: ``for one in sessions_on(model): one.detach()``.

    Example:
        >>> import torch, stablekit, stablekit_logits
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> session = stablekit.attach(optimizer, stablekit_logits.ZLoss(on=""), model=model)
        >>> sessions_on(model) == [session]
        True
        >>> session.detach()
        >>> sessions_on(model)
        []
    """
    found: list[Session] = []
    for _, session in _open(model):
        if session not in found:
            found.append(session)
    return found


def refuse_second(session: Session, plugin: str) -> None:
    """Raise if a plugin of that name acts on the model for another session.

    Raises:
        AttachError: It does; both would act, and nothing would show it.
    """
    model = modules.model_of(session, plugin)
    for name, other in _open(model):
        if name == plugin and other is not session:
            raise AttachError(
                f"{plugin} of another session, {other!r}, acts on this {type(model).__name__}"
                " still, and would act together with this one. Call detach() on that session"
                " first (stablekit.session(optimizer) finds it by its optimizer,"
                " stablekit_logits.sessions_on(model) by the model), or give this one another"
                " name= if both are meant"
            )


def _open(model: nn.Module) -> Iterator[tuple[str, Session]]:
    """Go through the doors in a model: the names of plugins, and their sessions."""
    for module in model.modules():
        for place in (*module._forward_hooks.values(), vars(module).get(LOSS)):
            # Hooks of others may be anything, and have no such method.
            if type(place).__module__.startswith(f"{__package__}."):
                yield from place.doors_open()  # type: ignore[union-attr]  # as all of ours
