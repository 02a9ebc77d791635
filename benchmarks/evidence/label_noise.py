"""Digits of which 40 % are labelled wrongly: what logit clipping and error norms make of them.

Run: ``python -m benchmarks.evidence.label_noise``. It prints a table in Markdown.

The data are scikit-learn's 1797 handwritten digits, 30 % of them held out with right labels. In the
others 40 % of the labels are replaced by another digit. A perceptron with two hidden layers is
trained on them for long enough to learn the wrong labels by heart.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import stablekit
from stablekit_clipping import GlobalNorm
from stablekit_logits import ErrorNormTruncation, LogitClip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["ARMS", "EARLY", "Data", "Result", "digits", "main", "table", "train"]

NOISE = 0.4
CLASSES = 10
BATCH = 128
WARMUP = 200

ARMS: dict[str, Callable[[], list[Any]]] = {
    "cross-entropy": list,
    "gradient norm clipped at 1": lambda: [GlobalNorm(1.0)],
    "LogitClip 0.5": lambda: [LogitClip(0.5, on="net")],
    "LogitClip 1": lambda: [LogitClip(1.0, on="net")],
    "LogitClip 2": lambda: [LogitClip(2.0, on="net")],
    "LogitClip 4": lambda: [LogitClip(4.0, on="net")],
    "LogitClip 1.5, repository's form": lambda: [LogitClip(1.5, form="repository", on="net")],
    "ENT threshold 1.2": lambda: [ErrorNormTruncation(1.2, warmup_steps=WARMUP, on="loss")],
    "ENT fraction 0.1": lambda: [ErrorNormTruncation(fraction=0.1, warmup_steps=WARMUP, on="loss")],
    "ENT fraction 0.4": lambda: [ErrorNormTruncation(fraction=0.4, warmup_steps=WARMUP, on="loss")],
}
"""What each row of the table attaches."""

EARLY = "cross-entropy, a tenth of the steps"
"""The last row: stopping before the wrong labels are learned costs nothing."""


class Data(NamedTuple):
    """One split, with the labels of its training part as they are given and as they should be."""

    x: Tensor
    given: Tensor
    right: Tensor
    x_test: Tensor
    y_test: Tensor


class Result(NamedTuple):
    """Of one run, shares of samples."""

    error: float
    """Of the held-out digits, against right labels."""
    memorised: float
    """Of the wrongly labelled training digits: those that the model calls by their wrong label."""


def digits(seed: int) -> Data:
    """Return a split of the digits, and noise in its training labels."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    drawn = np.random.default_rng(seed)
    order = drawn.permutation(len(bunch.target))
    x = torch.from_numpy(bunch.data[order] / 16.0).float()
    y = torch.from_numpy(bunch.target[order]).long()
    test = int(0.3 * len(y))
    right = y[test:]
    is_wrong = torch.from_numpy(drawn.random(len(right)) < NOISE)
    shift = torch.from_numpy(drawn.integers(1, CLASSES, len(right)))
    given = torch.where(is_wrong, (right + shift) % CLASSES, right)
    return Data(x[test:], given, right, x[:test], y[:test])


def train(data: Data, plugins: Sequence[Any], *, steps: int, seed: int) -> Result:
    """Train on the given labels with some plugins attached, and return what was learned."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )
    model = nn.ModuleDict({"net": net, "loss": nn.CrossEntropyLoss()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(seed)
    with stablekit.attach(optimizer, *plugins, model=model, log_every=0):
        for _ in range(steps):
            batch = torch.randint(0, len(data.x), (BATCH,), generator=drawn)
            optimizer.zero_grad()
            model["loss"](net(data.x[batch]), data.given[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        error = (net(data.x_test).argmax(1) != data.y_test).float().mean()
        learned = (net(data.x).argmax(1) == data.given)[data.given != data.right]
    return Result(error.item(), learned.float().mean().item())


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Return a table with the mean and the standard deviation over seeds of each row."""
    lines = ["| attached | test error | wrong labels learned |", "| --- | --- | --- |"]
    for name, runs in results.items():
        columns = zip(*runs, strict=True)
        lines.append(f"| {name} | {' | '.join(_spread(column) for column in columns)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.label_noise")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    seeds = range(given.seeds)
    results = {
        name: [train(digits(seed), make(), steps=given.steps, seed=seed) for seed in seeds]
        for name, make in ARMS.items()
    }
    results[EARLY] = [train(digits(s), [], steps=given.steps // 10, seed=s) for s in seeds]
    print(table(results))
    taken = time.perf_counter() - start
    print(f"\n{given.seeds} seeds of {given.steps} steps, {taken:.0f} s on one thread")


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


if __name__ == "__main__":
    main()
