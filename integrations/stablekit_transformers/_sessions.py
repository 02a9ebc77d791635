"""The sessions of one callback: of every training one, each from where it is to begin."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, final

import stablekit
from stablekit.errors import AttachError, StateWarning
from stablekit_transformers._clipping import BuiltInClipping, substitute

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from stablekit import Session


@final
class Sessions:
    """Attaches plugins to the optimizer of a training, and detaches them when it is over.

    Trainer keeps its optimizer for another ``train()``: then the state of the plugins goes on too.
    With another optimizer they begin as they were before the first.
    """

    def __init__(
        self, plugins: tuple[Any, ...], options: dict[str, Any], clipping: BuiltInClipping
    ) -> None:
        """Keep what sessions are made with."""
        self.plugins, self.options = plugins, options
        self.clipping = clipping
        self.latest: Session | None = None
        self._pristine: dict[str, Any] = {}
        self._left: dict[str, Any] | None = None

    def begin(
        self,
        optimizer: Any,  # noqa: ANN401 - maybe wrapped
        model: nn.Module,
        args: TrainingArguments,
        *,
        resumed: bool,
    ) -> bool:
        """Attach to an optimizer unless that was done before, and tell whether it was done now.

        Args:
            optimizer: that of the training.
            model: likewise.
            args: likewise.
            resumed: whether the caller restores the plugins from a checkpoint.

        Raises:
            AttachError: Another session holds the optimizer.
        """
        found = _session_of(optimizer)
        if found is not None and found is self.latest:
            return False
        if found is not None:
            raise AttachError(
                f"this optimizer has a session already, with {', '.join(found.plugins) or 'no'}"
                " plugins: list all plugins in one StableKitCallback or one attach(trainer, ...)"
            )
        left = None if resumed else self._left_by(optimizer)
        if self.latest is not None:
            self.latest.detach()
        with warnings.catch_warnings():
            if resumed or left is not None:  # restoring is the next thing to happen
                warnings.simplefilter("ignore", StateWarning)
            session = self._attached(optimizer, model, args)
        self._go_on(session, left)
        self.latest, self._left = session, None
        return True

    def end(self) -> None:
        """Detach, and keep the state for another training with the same optimizer."""
        if self.latest is not None and self._left is None:
            self._left = self.latest.state_dict()
            self.latest.detach()

    def _attached(
        self,
        optimizer: Any,  # noqa: ANN401 - maybe wrapped
        model: nn.Module,
        args: TrainingArguments,
    ) -> Session:
        """Return a new session, with what clips in Trainer's stead."""
        options = {**_following(args), **self.options}
        session = stablekit.attach(optimizer, *self.plugins, model=model, **options)
        limit = self.clipping.limit(args)
        if clipper := substitute(session, limit, tell=args.should_log and self.latest is None):
            session.detach()
            session = stablekit.attach(optimizer, *self.plugins, *clipper, model=model, **options)
        return session

    def _left_by(self, optimizer: Any) -> dict[str, Any] | None:  # noqa: ANN401 - maybe wrapped
        """Return the state that a training with the same optimizer has ended with."""
        if self.latest is None:
            return None
        inside = (optimizer, getattr(optimizer, "optimizer", None))
        return self._left if any(one is self.latest.optimizers[0] for one in inside) else None

    def _go_on(self, session: Session, left: dict[str, Any] | None) -> None:
        if self.latest is None:
            self._pristine = session.state_dict()
        elif left is None:  # plugins given as instances have learned from the optimizer before
            session.load_state_dict(self._pristine)
        else:
            session.load_state_dict(left, strict=False)
            session.track(**self.latest.tracked)


def _following(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that depend on the device: under FSDP parameters get there later."""
    on_host = args.device.type == "cpu"
    return {"device_mode": not on_host, "log_every": 1 if on_host else 10}


def _session_of(optimizer: Any) -> Session | None:  # noqa: ANN401 - as stablekit.session
    try:
        return stablekit.session(optimizer)
    except AttachError:
        return None
