"""Ten thousand random faults, alone and in bursts, leave nothing behind that is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pytest
import torch
from torch import Tensor

import stablekit
from stablekit_clipping import ZClip
from stablekit_recovery import Escalation, LRBackoff, NonFiniteGuard, Rollback, SkipSpikes

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES = (2.0, math.nan, math.inf, -math.inf, 1e38, 1e4, 0.0, None, 30.0)
GRADIENTS = (1.0, math.nan, math.inf, -math.inf, 3e38, 1e19, 1e6, 0.0, 1e-40, None, 40.0)
CLEAN = (0, 0, 0)
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, foreach=False),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def patterns(seed: int, count: int) -> list[list[tuple[int, int, int]]]:
    """Draw patterns: for one or two steps a loss and two gradients, then one clean step or none.

    Half of the steps have a fault in one of the three only. Patterns follow one another, so bursts
    grow longer than that.
    """
    random = np.random.default_rng(seed)
    drawn = []
    for faulty, clean in random.integers([1, 0], [3, 2], (count, 2)).tolist():
        kinds = random.integers(0, (len(LOSSES), len(GRADIENTS), len(GRADIENTS)), (faulty, 3))
        alone = random.random((faulty, 1)) < 0.5
        only = random.integers(0, 3, (faulty, 1)) == np.arange(3)
        steps = np.where(alone & ~only, 0, kinds).tolist()
        drawn.append([*map(tuple, steps), *([CLEAN] * clean)])
    return drawn


@final
class Run:
    """Two tiny parameters and a chain."""

    def __init__(self, make: str, *plugins: Any, device_mode: bool) -> None:  # noqa: ANN401 - any form
        """Attach."""
        self.params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))]
        self.optimizer = MAKERS[make](self.params)
        self.session = stablekit.attach(
            self.optimizer, *plugins, device_mode=device_mode, log_every=1
        )
        self.random = np.random.default_rng(0)

    def step(self, kinds: tuple[int, int, int]) -> None:
        """Take a step with these faults; 0 is none of them."""
        noise = float(self.random.random())
        loss, *gradients = LOSSES[kinds[0]], GRADIENTS[kinds[1]], GRADIENTS[kinds[2]]
        if loss is not None:
            self.session.observe(loss=loss * (1 + 0.1 * noise))
        for param, value in zip(self.params, gradients, strict=True):
            param.grad = None if value is None else torch.ones_like(param)
            if param.grad is not None and value is not None:
                param.grad[0] = 1 + noise if value == 1.0 else value
        self.optimizer.step()

    def broken(self) -> list[str]:
        """Return where something is not finite."""
        states = {f"state {i}": self.optimizer.state[p] for i, p in enumerate(self.params)}
        plugins = {
            name: plugin.state_dict()
            for name, plugin in self.session.plugins.items()
            if hasattr(plugin, "state_dict")
        }
        places = {"weights": list(self.params), **states, **plugins}
        return [where for where, value in places.items() if not _is_finite(value)]


def _is_finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return all(map(math.isfinite, value.flatten().tolist()))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def chain() -> list[Any]:
    """Return the full chain with windows so short that everything happens often."""
    return [
        NonFiniteGuard(max_consecutive=10**6),
        SkipSpikes(window=12, warmup_steps=4, max_consecutive=2),
        ZClip(warmup_steps=4),
        LRBackoff(recovery=5, cooldown=0),
        Rollback(3, calm=1, patience=3, max_skips=4, window=12, cooldown=3, max_rollbacks=10**6),
    ]


@pytest.mark.parametrize(
    ("make", "device_mode", "count", "seed"),
    [("sgd", False, 4500, 1), ("adamw", False, 4500, 2), ("fused", True, 1000, 3)],
)
def test_no_pattern_of_faults_leaves_anything_behind_or_stops_the_run(
    make: str, device_mode: bool, count: int, seed: int
) -> None:
    run = Run(make, *chain(), device_mode=device_mode)
    run.step(CLEAN)
    for number, pattern in enumerate(patterns(seed, count)):
        for step in pattern:
            run.step(step)
        assert not run.broken(), (number, pattern)
    kinds = {event.kind for event in run.session.events}
    assert kinds >= {"nonfinite", "skip", "lr-backoff", "rollback"}
    before = run.params[0].detach().clone()
    skipped = run.session.skipped
    for _ in range(20):
        run.step(CLEAN)
    assert run.session.skipped - skipped <= 2
    assert not torch.equal(run.params[0], before)


def test_escalation_alone_gets_through_too() -> None:
    kinds = set()
    for seed in range(30):
        rollback = Rollback(3, calm=1, patience=4, max_skips=4, window=12, cooldown=2)
        skip = SkipSpikes(window=12, warmup_steps=4, max_consecutive=2)
        run = Run("adamw", Escalation(skip=skip, rollback=rollback), device_mode=False)
        run.step(CLEAN)
        for pattern in patterns(seed, 20):
            for step in pattern:
                run.step(step)
            assert not run.broken(), (seed, pattern)
        kinds |= {event.kind for event in run.session.events if event.plugin}
    assert kinds >= {"skip", "lr-backoff", "rollback"}
