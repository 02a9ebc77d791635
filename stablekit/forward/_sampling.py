"""Which forward passes are looked at: those of training batches, in one step of so many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from stablekit.arguments import flag
from stablekit.forward.modules import is_compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from stablekit import Session, Step

__all__ = ["Sampling"]

_COMPILED = (
    "The model is compiled, and what torch.compile traced before stablekit was attached has no"
    " hooks: attach before torch.compile, or at least before the first call"
)
_ASK = "Is the model that was attached the one that is trained, is it in training mode?"
_IF_COMPILED = "If it is compiled, attach before torch.compile"
_NEVER_COMPILED = "Inside torch.compile nothing of this is seen"


@final
class Sampling:
    """A flag for the forward passes of the step to come, and the hooks that ask for it.

    The flag changes at the end of a step and at no other time. So a model that ``torch.compile``
    traced has two variants and not one a step, and what gradient checkpointing computes again is
    looked at again: what hooks keep must stand that.

    Args:
        every: sample the steps whose number this divides, at least 1.

    Example:
        >>> import stablekit
        >>> layer, sampling = torch.nn.Linear(2, 2), Sampling(every=1)
        >>> sampling.after(layer, lambda module, inputs, output: print(sampling.looks_at(module)))
        >>> sampling.attach(stablekit.attach(torch.optim.SGD(layer.parameters())))
        >>> _ = layer(torch.ones(2)), layer.eval()(torch.ones(2))
        True
        False
    """

    def __init__(self, every: int) -> None:
        """Look at nothing before a session is attached."""
        self.every = every
        self.is_armed = False
        self.session: Session | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, session: Session) -> None:
        """Serve a session from its next step on."""
        self.session = session
        self.arm(session.number)

    def detach(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.session, self.is_armed = None, False

    def after(self, module: nn.Module, hook: Callable[..., None], **options: bool) -> None:
        """Have a hook called after a module's forward."""
        self._handles.append(module.register_forward_hook(hook, **options))

    def before(self, module: nn.Module, hook: Callable[..., None], **options: bool) -> None:
        """Have a hook called before a module's forward."""
        self._handles.append(module.register_forward_pre_hook(hook, **options))

    def arm(self, number: int) -> None:
        """Decide about the step after this one: steps that ``every`` divides are sampled."""
        self.is_armed = (number + 1) % self.every == 0

    def looks_at(self, module: nn.Module) -> bool:
        """Tell whether a module is now computing for a training batch that is looked at."""
        return (
            self.is_armed
            and module.training
            and torch.is_grad_enabled()
            and self.session is not None
            and not self.session.is_paused
        )

    def complain(self, step: Step, seen: Tensor, what: str, *, compiles: bool = True) -> None:
        """Emit "unseen" in the first sampled step if nothing was there to be looked at.

        Args:
            step: a sampled step.
            seen: bool, of any shape; true where something was.
            what: the thing that was not.
            compiles: whether it would be seen inside ``torch.compile``, attached in time.
        """
        if step.number == self.every:
            model = step.session.model
            if model is None or not is_compiled(model):
                why = f"{_ASK} {_IF_COMPILED if compiles else _NEVER_COMPILED}"
            else:
                why = _COMPILED if compiles else _NEVER_COMPILED
            step.emit("unseen", f"{what} in a training step. {why}", when=~seen.any())

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is looked at."""
        return {"armed": self.is_armed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: The flag is not a bool.
        """
        self.is_armed = flag("armed", state["armed"])

    def __reduce__(self) -> tuple[type[Sampling], tuple[int]]:
        """Copy and pickle as one that looks at nothing: a copied model is not the one trained."""
        return Sampling, (self.every,)
