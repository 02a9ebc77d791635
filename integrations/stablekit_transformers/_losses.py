"""The loss of a step, from micro-batches whose losses are parts of it already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import TrainingArguments

    from stablekit import Session


@final
class PartialLosses:
    """Adds up what a model returns where Trainer tells it how many labels the whole step has.

    A model that is given ``num_items_in_batch`` divides by the labels of all micro-batches (of all
    ranks, with ``average_tokens_across_devices``): the loss of the step is the sum, where a session
    takes a mean. Other losses are left to the session.
    """

    def __init__(self) -> None:
        """Begin without a model."""
        self._sum: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def begin(self, model: nn.Module) -> None:
        """Listen to a model, and no longer to the one before."""
        self.end()
        self._handle = model.register_forward_hook(self, with_kwargs=True)

    def end(self) -> None:
        """Listen no longer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._sum = None

    def give(self, session: Session, args: TrainingArguments) -> None:
        """Pass the sum on to a session, scaled as Trainer scales it: ranks are averaged there."""
        total, self._sum = self._sum, None
        if total is not None:
            share = (
                args.world_size if args.average_tokens_across_devices else 1 / max(args.n_gpu, 1)
            )
            session.observe(loss=total * share)

    def __call__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Any,  # noqa: ANN401 - any model output
    ) -> None:
        """Hear a loss, as a forward hook."""
        loss = getattr(output, "loss", None)
        if keywords.get("num_items_in_batch") is None or not isinstance(loss, Tensor):
            return
        if module.training and loss.requires_grad and loss.numel() == 1:
            # A copy, since Trainer multiplies the loss in place by the number of ranks.
            part = loss.detach().to(torch.float32, copy=True)
            self._sum = part if self._sum is None else self._sum + part.to(self._sum.device)
