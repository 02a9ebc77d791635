"""A run of three tensors under watch, for the tests of SpikeMonitor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import stablekit
from stablekit import hookimpl
from stablekit_monitors import SpikeMonitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablekit import Event, Plugin, Step

NAMES = ("embed", "middle", "head")
NOISE = 0.05


class SkipNow:
    """Skips the steps it is told to."""

    name = "skip-now"

    def __init__(self) -> None:
        self.now = False

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        step.skip("told to", when=self.now)


class Run:
    """Three tensors with noisy gradients around 1, and a loss around 2."""

    def __init__(
        self,
        *others: Plugin,
        device_mode: bool = False,
        monitor: SpikeMonitor | None = None,
        lr: float = 0.0,
        log_every: int = 1,
    ) -> None:
        self.params = [nn.Parameter(torch.zeros(n)) for n in (4, 3, 2)]
        pairs = list(zip(NAMES, self.params, strict=True))
        self.optimizer = torch.optim.AdamW(pairs, lr=lr, fused=True)
        self.monitor = monitor or SpikeMonitor(warmup_steps=10, patience=5, merge_steps=3)
        self.session = stablekit.attach(
            self.optimizer, self.monitor, *others, device_mode=device_mode, log_every=log_every
        )
        self.noise = torch.Generator().manual_seed(0)

    def step(self, loss: float = 2.0, grads: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        """Step once; losses and gradients are times a little noise."""
        draws = (1 + NOISE * torch.randn(4, generator=self.noise)).tolist()
        for param, grad, draw in zip(self.params, grads, draws[:3], strict=True):
            param.grad = torch.full_like(param, grad * draw)
        self.session.observe(loss=torch.tensor(loss * draws[3]))
        self.optimizer.step()

    def usual(self, steps: int) -> Run:
        """Step as usual."""
        for _ in range(steps):
            self.step()
        return self

    def events(self, kind: str = "") -> list[Event]:
        """Return what the monitor said."""
        self.session.metrics()
        said = [e for e in self.session.events if e.plugin == "spike-monitor"]
        return [event for event in said if kind in ("", event.kind)]

    def state(self) -> dict[str, Any]:
        """Return the monitor's state."""
        state: dict[str, Any] = self.session.state_dict()["plugins"]["spike-monitor"]["state"]
        return state
