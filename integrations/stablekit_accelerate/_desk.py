"""Two methods of an Accelerator, replaced on the object as long as sessions are attached to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate import Accelerator

    from stablekit_accelerate._companion import Companion

_REPLACED = ("backward", "clip_grad_norm_")


@final
class Desk:
    """What stands between a loop and its accelerator, for all sessions there are."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Leave the accelerator as it is until somebody joins."""
        self.accelerator = accelerator
        self._members: list[Companion] = []
        self._before: dict[str, Any] = {}
        self._own: dict[str, Any] = {}

    @classmethod
    def of(cls, accelerator: Accelerator) -> Desk:
        """Return the desk an accelerator has, or a new one."""
        found = getattr(vars(accelerator).get("backward"), "__self__", None)
        return found if isinstance(found, Desk) else Desk(accelerator)

    @property
    def is_told_losses(self) -> bool:
        """Whether some session takes the losses."""
        return any(member.takes_losses for member in self._members)

    def index(self, member: Companion) -> int:
        """Return the place of a member among all, in the order in which they joined."""
        return self._members.index(member)

    def join(self, member: Companion) -> None:
        """Replace the methods, if this is the first member."""
        if not self._members:
            self._own = {n: v for n, v in vars(self.accelerator).items() if n in _REPLACED}
            self._before = {name: getattr(self.accelerator, name) for name in _REPLACED}
            for name in _REPLACED:
                setattr(self.accelerator, name, getattr(self, name))
        self._members.append(member)

    def leave(self, member: Companion) -> None:
        """Put the methods back after the last one, unless somebody else has replaced them since."""
        self._members.remove(member)
        for name in () if self._members else _REPLACED:
            if vars(self.accelerator).get(name) != getattr(self, name):
                continue
            if name in self._own:
                setattr(self.accelerator, name, self._own[name])
            else:
                delattr(self.accelerator, name)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - as Accelerator's
        """Let the session know the loss, then do as before."""
        for member in self._members:
            member.saw_loss(loss)
        self._before["backward"](loss, **kwargs)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float | Tensor, norm_type: float = 2
    ) -> Any:  # noqa: ANN401 - as Accelerator's
        """Measure for the session whose parameters these are, or do as before."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for member in self._members:
            if member.clipping.takes(params, norm_type):
                return member.clipping.measure(params, max_norm, norm_type)
        return self._before["clip_grad_norm_"](params, max_norm, norm_type=norm_type)
