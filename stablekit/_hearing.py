"""The losses of the step to come: told by the training loop, or overheard from model or closure."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from stablekit._layout import parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer

    from stablekit._session import Session

MAX_LOSSES = 4096


@final
class Hearing:
    """Losses seen since the last step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Start with none."""
        self._optimizers = optimizers
        self._observed: deque[Tensor] = deque(maxlen=MAX_LOSSES)
        self._overheard: list[Tensor] = []
        self._witness: weakref.ref[Tensor] | None = None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._observed or self._overheard)

    def observe(self, loss: Tensor | float) -> None:
        """Keep a loss that the training loop told.

        Raises:
            ValueError: It is not a scalar.
        """
        self._forget_lost()
        self._observed.append(_scalar(loss))

    def overhear(self, loss: Tensor, *, instead: bool = False) -> None:
        """Keep a loss that nobody told, perhaps instead of those before."""
        if loss.numel() == 1:
            self._overheard = [*([] if instead else self._overheard), _scalar(loss)]

    def take(self) -> list[Tensor]:
        """Return the losses and forget them; those overheard only if the loop told none."""
        losses = list(self._observed) or self._overheard
        self._observed.clear()
        self._overheard, self._witness = [], None
        return losses

    def _forget_lost(self) -> None:
        """Drop losses of a step that never came: a GradScaler does not call the optimizer then.

        The gradients they belong to are gone; those of micro-batches before are still there.
        """
        grads = (param.grad for param in parameters_of(self._optimizers))
        current = next((grad for grad in grads if grad is not None), None)
        known = self._witness() if self._witness is not None else None
        if self._observed and self._witness is not None and known is not current:
            self._observed.clear()
        self._witness = None if current is None else weakref.ref(current)


@final
class Ear:
    """The hook that hears a model's loss; in a copied model, which is not trained, it is deaf."""

    def __init__(self, session: Session | None = None) -> None:
        """Listen for a session."""
        self._session = session

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - any model output
        """Take in ``output.loss`` of a forward pass in training."""
        if self._session is None or self._session.is_paused or not module.training:
            return
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._session.hearing.overhear(loss)

    def __reduce__(self) -> tuple[type[Ear], tuple[()]]:
        """Leave the session out of copies and pickles."""
        return Ear, ()


def _scalar(loss: Tensor | float) -> Tensor:
    value = loss.detach().clone() if isinstance(loss, Tensor) else Tensor([loss])
    if value.numel() != 1:
        raise ValueError(f"loss must be a scalar, got a tensor of shape {list(value.shape)}")
    return value.reshape(())
