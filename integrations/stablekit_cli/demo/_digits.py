"""Workload ``digits``: a small MLP whose AdamW run spikes long after it has converged."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from stablekit_cli.demo._workload import Facts

__all__ = ["Digits"]

BATCH = 64
HELD_OUT_SHARE = 5


class Digits:
    """scikit-learn's digits; a fifth of the images is held out."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        held_out = len(labels) // HELD_OUT_SHARE
        self.facts = Facts(
            name="digits",
            title="MLP (64-128-128-128-10) on scikit-learn's digits; AdamW lr 0.03, batch 64",
            data=(
                f"digits: {len(labels)} images, {held_out} of them held out; "
                f"sha256 {hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()}"
            ),
            unit="nats per image",
            steps=2000,
            settled=1 / 4,
            injected_tensor="hidden2.weight",
            high_loss=0.3,
        )
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        inputs = torch.from_numpy(images).float()[shuffled] / 16
        targets = torch.from_numpy(labels).long()[shuffled]
        self._held_out = inputs[:held_out], targets[:held_out]
        self._train = inputs[held_out:], targets[held_out:]

    def model(self) -> nn.Module:
        """Build the MLP."""
        sizes = (64, 128, 128, 128)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after) in enumerate(pairwise(sizes), start=1):
            layers[f"hidden{number}"] = nn.Linear(before, after)
            layers[f"relu{number}"] = nn.ReLU()
        layers["head"] = nn.Linear(sizes[-1], 10)
        return nn.Sequential(layers)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build AdamW at a learning rate ten times too high for this model."""
        return torch.optim.AdamW(model.parameters(), lr=0.03)

    def loss(self, model: nn.Module, order: torch.Generator) -> torch.Tensor:
        """Return the loss of 64 images."""
        inputs, targets = self._train
        drawn = torch.randint(len(targets), (BATCH,), generator=order)
        return functional.cross_entropy(model(inputs[drawn]), targets[drawn])

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """Return the loss on the held-out images."""
        inputs, targets = self._held_out
        return functional.cross_entropy(model(inputs), targets).item()
