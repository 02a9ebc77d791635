"""The gradient stream of tests/golden, and playing a stream of gradients through a plugin."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import stablekit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stablekit import Session

Array = npt.NDArray[np.float32]
Norms = npt.NDArray[np.float64]
Spike = tuple[int, float, "str | list[int]"]

SHAPES = ((8, 16), (16,), (4, 4, 3, 3))
_SCALES = (1.0, 0.3, 2.0)
_GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden(name: str) -> dict[str, Any]:
    """Return the content of a file of tests/golden."""
    content: dict[str, Any] = json.loads((_GOLDEN / f"{name}.json").read_text())
    return content


def numbers(values: object) -> Norms:
    """Return nested lists of numbers as an array; None and "nan" are NaN, "inf" is infinite."""
    return np.array(values, dtype=np.float64)


def stream(seed: int, steps: int, spikes: Iterable[Sequence[Any]]) -> Iterator[list[Array]]:
    """Yield the gradients of each step: noise of falling scale, times the factors of spikes.

    A spike is (step, factor, "all" or a list of tensors); steps count from 1.
    """
    rng = np.random.default_rng(seed)
    for t in range(1, steps + 1):
        j = rng.standard_normal()
        scale = round(0.05 * (0.4 + math.exp(-t / 60)) * math.exp(0.15 * j), 8)
        gradients = []
        for i, shape in enumerate(SHAPES):
            z = rng.standard_normal(shape)
            factor = 1.0
            for step, spike, which in spikes:
                if step == t and (which == "all" or i in which):
                    factor *= spike
            gradients.append((z * (scale * _SCALES[i] * factor)).astype(np.float32))
        yield gradients


def initial_values(seed: int) -> list[Array]:
    """Return the parameters that belong to a stream."""
    rng = np.random.default_rng([seed, 99])
    return [(0.5 * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]


def sha256(arrays: Iterable[Array]) -> str:
    """Return the hash over the raw bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def tensor_norms(gradients: Iterable[Array | None]) -> list[float]:
    """Return the norm of each gradient in float64, 0 without one."""
    return [
        0.0 if g is None else float(np.linalg.norm(g.astype(np.float64).ravel())) for g in gradients
    ]


@dataclass
class Played:
    """What a plugin did with a stream, step by step."""

    session: Session
    plugin: Any
    norms: Norms = field(default_factory=lambda: np.zeros((0, 0)))
    """Norm of every tensor after the step, ``[steps, tensors]``."""
    gradients: list[list[Array | None]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def totals(self) -> Norms:
        """Global norm after each step."""
        with np.errstate(over="ignore"):
            totals: Norms = np.sqrt((self.norms**2).sum(axis=1))
        return totals

    def metric(self, name: str) -> Norms:
        """Return one of the plugin's metrics over the steps."""
        return numbers([metrics[f"{self.plugin.name}/{name}"] for metrics in self.metrics])

    def acted(self) -> list[int]:
        """Return the steps in which the plugin clipped, from 1."""
        return [t for t, share in enumerate(self.metric("clipped"), start=1) if share > 0]


def play(
    plugin: Any,  # noqa: ANN401 - any plugin form
    gradients: Iterable[Sequence[Array | None]],
    *,
    device_mode: bool = False,
    before: Sequence[Any] = (),
    values: Sequence[Array] | None = None,
) -> Played:
    """Give a plugin a stream of gradients, with an optimizer that does not move.

    Args:
        plugin: the plugin under test, an instance.
        gradients: per step one array, or None, for each tensor.
        device_mode: as in ``stablekit.attach``.
        before: plugins to be listed before it.
        values: the parameters; by default zeros in the shape of the first gradients.
    """
    played: Played | None = None
    norms = []
    for step in gradients:
        if played is None:
            start = (
                values if values is not None else [np.zeros_like(g) for g in step if g is not None]
            )
            params = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in start]
            optimizer = torch.optim.SGD([(f"t{i}", p) for i, p in enumerate(params)], lr=0.0)
            session = stablekit.attach(optimizer, *before, plugin, device_mode=device_mode)
            played = Played(session, plugin)
        for param, gradient in zip(params, step, strict=True):
            param.grad = None if gradient is None else torch.from_numpy(gradient.copy())
        optimizer.step()
        left = [None if param.grad is None else param.grad.numpy() for param in params]
        played.gradients.append(left)
        norms.append(tensor_norms(left))
        played.metrics.append(session.metrics())
        if hasattr(plugin, "state_dict"):
            played.states.append(plugin.state_dict())
    assert played is not None
    played.norms = np.array(norms)
    return played


def filled(values: Iterable[float], sizes: Sequence[int] = (4,)) -> list[list[Array | None]]:
    """Return a stream in which all tensors have one norm, the given ones; None is no gradient."""
    return [
        [np.full(size, value / math.sqrt(sum(sizes)), dtype=np.float32) for size in sizes]
        for value in values
    ]
