"""Workload ``rnn``: a character RNN whose gradients explode (Pascanu et al., arXiv 1211.5063)."""

from __future__ import annotations

import hashlib
import pydoc_data.topics

import torch
from torch import nn
from torch.nn import functional

from stablekit_cli.demo._windows import held_out_windows, to_tensor, windows
from stablekit_cli.demo._workload import Facts

__all__ = ["Rnn"]

CONTEXT = 128
BATCH = 16
LEARNING_RATE = 1.0
MOMENTUM = 0.9


class CharacterRnn(nn.Module):
    """Embedding, tanh RNN, linear head."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.rnn = nn.RNN(32, 128, batch_first=True)
        self.head = nn.Linear(128, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map byte values ``[batch, time]`` to logits."""
        hidden, _ = self.rnn(self.embedding(tokens))
        logits: torch.Tensor = self.head(hidden)
        return logits


class Rnn:
    """The help texts of Python itself; the last tenth of them is held out."""

    def __init__(self) -> None:
        text = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
        content = text.encode("ascii", errors="replace")
        cut = len(content) * 9 // 10
        self.facts = Facts(
            name="rnn",
            title=(
                "character RNN (tanh, width 128) on 128-character windows of pydoc_data.topics; "
                f"SGD lr {LEARNING_RATE}, momentum {MOMENTUM}"
            ),
            data=(
                f"pydoc_data.topics: {cut:,} bytes to train on, {len(content) - cut:,} held out; "
                f"sha256 {hashlib.sha256(content).hexdigest()}"
            ),
            unit="nats per character",
            steps=800,
            settled=1 / 8,
            injected_tensor="rnn.weight_hh_l0",
        )
        self._train = to_tensor(content[:cut])
        self._held_out = held_out_windows([content[cut:]], CONTEXT, total=256)

    def model(self) -> nn.Module:
        """Build the RNN."""
        return CharacterRnn(128)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build SGD at a learning rate at which this RNN explodes."""
        return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def loss(self, model: nn.Module, order: torch.Generator) -> torch.Tensor:
        """Return the loss of 16 windows of 128 characters."""
        return _loss(model, windows(self._train, CONTEXT, BATCH, order))

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """Return the loss on the last tenth of the text."""
        return _loss(model, self._held_out).item()


def _loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
