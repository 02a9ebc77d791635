"""A language model of its own with the loss function of those of transformers, and tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

WORDS, LENGTH = 16, 7


def causal_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the cross entropy of the next word, one position after the other."""
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    if shift_labels is not None:
        targets = shift_labels
    losses = [
        -row.log_softmax(-1)[label]
        for row, label in zip(logits.flatten(0, 1), targets.flatten(), strict=True)
        if label != ignore_index
    ]
    divisor = len(losses) if num_items_in_batch is None else num_items_in_batch
    return torch.stack(losses).sum() / divisor


@final
class Speaker(nn.Module):
    """Embedding and head; ``loss_function`` can be replaced as in models of transformers."""

    def __init__(self, seed: int = 0) -> None:
        """Make weights whose logits are well above 0."""
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, 6)
        self.head = nn.Linear(6, WORDS)
        with torch.no_grad():
            self.head.weight.mul_(6.0)

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss function, its own or one that was set."""
        own = hasattr(self, "_loss_function")
        found: Callable[..., Tensor] = self._loss_function if own else causal_loss
        return found

    @loss_function.setter
    def loss_function(self, value: Callable[..., Tensor]) -> None:
        self._loss_function = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def forward(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:  # noqa: ANN401 - for the loss
        """Return the loss, or the logits where there are no labels."""
        logits: Tensor = self.head(self.embedding(ids))
        if labels is None:
            return logits
        return self.loss_function(logits, labels, **options)


def words(seed: int = 0, *, rows: int = 3, ignored: int = 0) -> Tensor:
    """Return sentences; the last words of the first one are marked as ignored."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (rows, LENGTH), generator=made)
    ids[0, LENGTH - ignored :] = -100
    return ids


def inputs_of(labels: Tensor) -> Tensor:
    """Return what is read where labels are ignored: word 0."""
    return labels.clamp(min=0)


def z_by_hand(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the sum of squared log-partition functions over positions with a next word."""
    total, count = torch.zeros(()), 0
    for sentence, targets in zip(logits, labels, strict=True):
        for place in range(len(targets) - 1):
            if targets[place + 1] != -100:
                total = total + sentence[place].exp().sum().log() ** 2
                count += 1
    return total, count


def gradients(model: nn.Module) -> list[Tensor]:
    """Return copies of all gradients, and forget them."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found
