"""The way onto a module's output and off it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import Sampling, modules
from stablekit_logits._doors_on import refuse_second
from stablekit_logits._heads import head_of
from stablekit_logits._liger import refuse_liger
from stablekit_logits._tally import Tally
from stablekit_logits._use import Use

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session, Step

__all__ = ["OutputDoor"]

_WHY = (
    "is the model that was attached the one that is trained, was it compiled and used before it was"
    " attached, does a fused loss take its weight instead?"
)


@final
class OutputDoor:
    """Calls a function on the logits that a module puts out.

    ``through`` gets logits ``[..., classes]`` and returns what is to go on in their place. What
    the :class:`~stablekit_logits._loss_door.LossDoor` says of its function holds for this one.

    Without ``stays``, only in training, and not in copies of the model. A method that makes another
    model gives ``stays``: at all times the output goes through it, in copies of the model too;
    ``through`` is called in its place in training, and must compute the same.

    Args:
        plugin: the name of who asks.
        metrics: names of the columns of ``tally``.
        on: name of the module, "" for the model itself; None for the output embedding.
        through: see above.
        stays: see above; it must be picklable.
    """

    def __init__(
        self,
        plugin: str,
        *metrics: str,
        on: str | None,
        through: Callable[[Tensor], Tensor],
        stays: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keep it closed."""
        self.plugin, self.on, self.through, self.stays = plugin, on, through, stays
        self.tally = Tally(*metrics)
        self.session: Session | None = None
        self._use = Use(plugin)
        self._sampling = Sampling(every=1)
        self._head: nn.Module | None = None
        self._handles: list[Any] = []

    def open(self, session: Session) -> None:
        """Listen to the module.

        Raises:
            AttachError: There is no model, or no such module, or several, or this plugin acts on
                the model for another session.
        """
        model = modules.model_of(session, self.plugin)
        refuse_liger(model, self.plugin)
        refuse_second(session, self.plugin)
        self._head = head_of(model, self.on, self.plugin)
        self._handles = [self._head.register_forward_hook(_Hook(self, self.stays))]
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
        self._handles, self._head, self.session = [], None, None

    def check(self, step: Step) -> None:
        """Raise if the module put nothing out in any step yet, tell of the first it no longer did.

        Raises:
            AttachError: It did not; training would not be what was asked for.
        """
        if self._head is not None:
            module = "the output embedding" if self.on is None else f"the module {self.on!r}"
            self._use.check(step, self._head, f"the output of {module}", lambda: _WHY)

    def acts(self, module: nn.Module) -> bool:
        """Tell whether a module is now computing for a training batch."""
        return self._use.looks(self._sampling, module, at_all_times=self.stays is not None)

    def pass_on(self, logits: Tensor) -> Tensor:
        """Call ``through``; in a dry run its result is dropped."""
        assert self.session is not None
        if not self.session.dry_run:
            return self.through(logits)
        with torch.no_grad():
            self.through(logits)
        return logits


@final
class _Hook:
    """The forward hook: a copied model gets one without the door."""

    def __init__(self, door: OutputDoor | None, stays: Callable[[Tensor], Tensor] | None) -> None:
        self.door, self.stays = door, stays

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:  # noqa: ANN401 - any module's
        if self.door is not None and self.door.acts(module):
            return self.door.pass_on(_logits(output, module))
        if self.stays is None or self._is_dry():
            return output
        return self.stays(_logits(output, module))

    def doors_open(self) -> list[tuple[str, Session]]:
        """Return the plugin that acts here and its session, none in a copied model."""
        session = None if self.door is None else self.door.session
        return [] if self.door is None or session is None else [(self.door.plugin, session)]

    def _is_dry(self) -> bool:
        session = None if self.door is None else self.door.session
        return session is not None and session.dry_run

    def __reduce__(self) -> tuple[type[_Hook], tuple[None, Callable[[Tensor], Tensor] | None]]:
        return _Hook, (None, None if self._is_dry() else self.stays)


def _logits(output: Any, module: nn.Module) -> Tensor:  # noqa: ANN401 - any module's output
    if isinstance(output, Tensor):
        return output
    raise AttachError(
        "logits are taken from a module that returns a tensor, but"
        f" {type(module).__name__} returned {type(output).__name__}; name its head with on="
    )
