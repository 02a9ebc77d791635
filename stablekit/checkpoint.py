"""A session in checkpoints of ``torch.distributed.checkpoint``, which drops it from optimizers.

It keeps of an optimizer what belongs to parameters, and loads other values into the places, of the
shapes, that the loading process has. So the state of a session goes in beside, as one value::

    state = {"model": model, "optimizer": optimizer, "stablekit": SessionState(session)}
    dcp.save(state, checkpoint_id=folder)
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, final

import torch

from stablekit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit._session import Session

__all__ = ["SessionState"]

_KEY = "session"


@final
class SessionState:
    """A session as ``torch.distributed.checkpoint.stateful.Stateful``: one value of bytes.

    The state is the same on every rank and does not depend on how many there are: rank 0 writes
    it, and any number of ranks may load it. Load it in the same call as the optimizer, or before
    the first step after.

    Args:
        session: whose state is saved and restored.
        strict: refuse a state of other plugins instead of warning.

    Example:
        >>> import torch, stablekit
        >>> from stablekit.checkpoint import SessionState
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
        >>> state = SessionState(stablekit.attach(optimizer, "zclip"))
        >>> # dcp.save({"model": ..., "optimizer": ..., "stablekit": state}, checkpoint_id=folder)
        >>> # dcp.load({"model": ..., "optimizer": ..., "stablekit": state}, checkpoint_id=folder)
        >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, session: Session, *, strict: bool = True) -> None:
        """Keep the session."""
        self.session = session
        self.strict = strict

    def state_dict(self) -> dict[str, bytes]:
        """Return the state as one value, which no one takes apart."""
        file = io.BytesIO()
        torch.save(self.session.state_dict(), file)
        return {_KEY: file.getvalue()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            StateError: It is something else, or does not fit the session; nothing was changed.
        """
        value = state_dict.get(_KEY)
        if not isinstance(value, bytes):
            raise StateError(
                f"expected what SessionState.state_dict() returned, got {_KEY!r} of type"
                f" {type(value).__name__}"
            )
        saved = torch.load(io.BytesIO(value), weights_only=True, map_location="cpu")
        self.session.load_state_dict(saved, strict=self.strict)
