"""Golden files with labels, and small runs of classifiers and language models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stablekit

_FOLDER = Path(__file__).resolve().parent.parent / "golden"
CLASSES = 5


def golden(name: str) -> tuple[dict[str, Tensor], Any]:
    """Return the inputs of a file, checked against its sums, and its outputs."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    generator = np.random.default_rng(content["seed"])
    inputs = {}
    for entry in content["inputs"]:
        shape = tuple(entry["shape"])
        drawn: Any
        if entry["kind"] == "normal":
            drawn = entry["scale"] * generator.standard_normal(shape) + entry["shift"]
        elif entry["kind"] == "integers":
            drawn = generator.integers(entry["lo"], entry["hi"], shape)
        else:
            drawn = generator.uniform(entry["lo"], entry["hi"], shape)
        assert np.isclose(drawn.sum(), entry["check"]["sum"]), entry["name"]
        inputs[entry["name"]] = torch.from_numpy(drawn)
    return inputs, content["outputs"]


def exact(numbers: Any) -> Tensor:  # noqa: ANN401 - nested lists of a golden file
    return torch.tensor(numbers, dtype=torch.float64)


class Classifier(nn.Module):
    """A classifier that holds its loss, as a plugin that needs labels takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).tanh())
        return logits


def classifier() -> Classifier:
    """Return one with weights large enough for its logits to differ."""
    torch.manual_seed(0)
    model = Classifier()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(4.0)
    return model


def samples(number: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 6, generator=made)
    return x, torch.randint(0, CLASSES, (rows,), generator=made)


def fit(
    model: Classifier,
    *plugins: Any,  # noqa: ANN401 - any plugin form
    steps: int = 3,
    **options: Any,  # noqa: ANN401 - of attach
) -> tuple[list[float], list[Tensor], Any]:
    """Train a copy; return losses, weights and the session, which is attached still."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    session = stablekit.attach(optimizer, *plugins, model=model, **options) if plugins else None
    losses = []
    for number in range(steps):
        x, y = samples(number)
        optimizer.zero_grad()
        loss = model.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [param.detach().clone() for param in model.parameters()], session


def fit_hf(
    model: Any,  # noqa: ANN401 - of transformers
    batches: list[dict[str, Any]],
    *plugins: Any,  # noqa: ANN401 - any plugin form
    accumulate: int = 1,
    wrap: Any = None,  # noqa: ANN401 - what is done to the copy, e.g. torch.compile
    lr: float = 0.01,
    **options: Any,  # noqa: ANN401 - of attach
) -> tuple[list[float], list[Tensor], Any]:
    """The same for a model of transformers that computes its loss."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    session = stablekit.attach(optimizer, *plugins, model=model, **options) if plugins else None
    call = model if wrap is None else wrap(model)
    losses = []
    for number, batch in enumerate(batches):
        loss = call(**batch).loss
        loss.backward()
        losses.append(loss.item())
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, [param.detach().clone() for param in model.parameters()], session


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether all bits are the same."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first: list[Tensor], second: list[Tensor], *, rtol: float = 1e-5) -> bool:
    """Tell whether all numbers are nearly the same."""
    pairs = zip(first, second, strict=True)
    return all(torch.allclose(a, b, rtol=rtol, atol=1e-7) for a, b in pairs)
