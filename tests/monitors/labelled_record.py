"""Record losses and norms of small training runs with injected faults, as labelled_runs.npz.

``python -m tests.monitors.labelled_record`` takes about a minute. What it reads is installed with
Python (the help texts of ``pydoc_data``) and with scikit-learn (its digits).
"""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    Batch = tuple[Tensor, Tensor]

TARGET = Path(__file__).with_name("labelled_runs.npz")
VISIBLE, BEFORE = 1.3, 30
"""A fault is labelled where it raised the value to 1.3 times that without it or more, and above
all values without fault in the 30 steps before."""
_ROWS, _CONTEXT = 16, 64


@final
@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        model: makes the model.
        batch: makes the batch of a step.
        optimizer: makes the optimizer.
        steps: how many to train for.
        faults: step -> what is done in it: "garbage" (random targets and inputs), "one tensor" (its
            gradient times 50), "all tensors" (times 20), "rate" (this and two more steps at 30
            times the learning rate).
        clip: limit of the global norm, as the run's author would have set it.
        schedule: factor of the learning rate by step.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, bool], Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int = 600
    faults: dict[int, str] = field(default_factory=dict)
    clip: float = 1.0
    schedule: Callable[[int], float] = lambda _: 1.0


class CharRNN(nn.Module):
    """A recurrent network over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.rnn = nn.RNN(32, 96, batch_first=True)
        self.head = nn.Linear(96, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.embed(tokens))[0])
        return logits


class Transformer(nn.Module):
    """A small pre-LN transformer over bytes."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.place = nn.Parameter(torch.randn(_CONTEXT, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(_CONTEXT)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def text(rows: int = _ROWS) -> Callable[[torch.Generator, bool], Batch]:
    """Return what draws windows of Python's help texts, or random bytes."""
    joined = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    corpus = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()

    def draw(generator: torch.Generator, garbage: bool) -> Batch:
        starts = torch.randint(len(corpus) - _CONTEXT - 1, (rows,), generator=generator)
        windows = torch.stack([corpus[i : i + _CONTEXT + 1] for i in starts])
        if garbage:
            windows = torch.randint(128, windows.shape, generator=generator)
        return windows[:, :-1], windows[:, 1:]

    return draw


def digits(rows: int = 64) -> Callable[[torch.Generator, bool], Batch]:
    """Return what draws images of digits, or noise with random labels."""
    images, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(targets).long()

    def draw(generator: torch.Generator, garbage: bool) -> Batch:
        chosen = torch.randint(len(x), (rows,), generator=generator)
        if garbage:
            return 3 * torch.rand(rows, 64, generator=generator), torch.randint(
                10, (rows,), generator=generator
            )
        return x[chosen], y[chosen]

    return draw


def mlp() -> nn.Module:
    """Return a network for digits."""
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


def train(recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """Return losses, norms, and for each signal the steps in which a fault shows."""
    torch.manual_seed(seed)
    model, generator = recipe.model(), torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(model)
    rate = optimizer.param_groups[0]["lr"]
    seen: dict[str, list[float]] = {"loss": [], "norm": []}
    labels: dict[str, list[int]] = {"loss": [], "norm": []}
    for step in range(recipe.steps):
        fault = recipe.faults.get(step, "")
        batch = recipe.batch(generator, False)
        usual = here = _pass(model, batch, "")
        if fault == "garbage":
            here = _pass(model, recipe.batch(generator, True), "")
        elif fault in ("one tensor", "all tensors"):
            here = _pass(model, batch, fault)
        for name, value, without in zip(("loss", "norm"), here, usual, strict=True):
            seen[name].append(value)
            if fault and value > max(VISIBLE * without, *_quiet(seen[name], recipe.faults)):
                labels[name].append(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        hot = any(recipe.faults.get(step - ago) == "rate" for ago in range(3))
        optimizer.param_groups[0]["lr"] = rate * (30.0 if hot else recipe.schedule(step))
        optimizer.step()
    for step in (step for step, fault in recipe.faults.items() if fault == "rate"):
        for name, values in seen.items():
            labels[name] += _aftermath(values, step)
    return {
        **{name: np.array(values, dtype=np.float32) for name, values in seen.items()},
        **{f"{name} spikes": np.array(sorted(steps), np.int32) for name, steps in labels.items()},
        "faults": np.array(sorted(recipe.faults), np.int32),
    }


def _quiet(values: list[float], faults: dict[int, str]) -> list[float]:
    """Return the latest values, without the current one and without faults."""
    now = len(values) - 1
    return [values[step] for step in range(now - BEFORE, now) if step not in faults]


def _aftermath(values: list[float], fault: int) -> list[int]:
    """Return which of the five steps after a fault in the rate have a high value."""
    before = values[fault - BEFORE : fault + 1]
    least = max(VISIBLE * float(np.median(before)), *before)
    return [step for step in range(fault + 1, fault + 6) if values[step] > least]


def _pass(model: nn.Module, batch: Batch, fault: str) -> tuple[float, float]:
    """Leave gradients in the model and return loss and norm."""
    model.zero_grad()
    inputs, targets = batch
    loss = functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    torch.autograd.backward(loss)
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    if fault == "one tensor":
        grads[len(grads) // 2] *= 50
    elif fault == "all tensors":
        torch._foreach_mul_(grads, 20.0)
    norm = torch.stack([grad.double().norm() for grad in grads]).norm()
    return loss.item(), norm.item()


def _sgd(rate: float, momentum: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def _adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate)


def _stable_then_decay(step: int) -> float:
    return min(1.0, (step + 1) / 100) * (1.0 if step < 450 else 1.0 - (step - 450) / 160)


_MIXED = {
    170: "garbage",
    230: "one tensor",
    290: "all tensors",
    350: "garbage",
    353: "garbage",
    420: "rate",
    500: "one tensor",
    560: "garbage",
}

RECIPES = {
    "rnn, sgd": Recipe(CharRNN, text(), _sgd(1.0), faults=_MIXED),
    "rnn, sgd, batch of 2, no fault": Recipe(CharRNN, text(2), _sgd(0.5)),
    "transformer, adamw": Recipe(Transformer, text(), _adamw(3e-3), faults=_MIXED),
    "transformer, schedule, no fault": Recipe(
        Transformer, text(), _adamw(3e-3), schedule=_stable_then_decay
    ),
    "transformer, batch of 2, no fault": Recipe(Transformer, text(2), _adamw(3e-3)),
    "digits, adamw": Recipe(mlp, digits(), _adamw(2e-3), faults=_MIXED),
    "digits, sgd, batch of 8, no fault": Recipe(mlp, digits(8), _sgd(0.1)),
}


def main() -> None:
    """Train everything and write the file."""
    torch.set_num_threads(1)
    arrays = {
        f"{name}/{key}": values
        for number, (name, recipe) in enumerate(RECIPES.items())
        for key, values in train(recipe, seed=number).items()
    }
    np.savez_compressed(TARGET, **arrays)  # type: ignore[arg-type]  # numpy's stub takes one type


if __name__ == "__main__":
    main()
