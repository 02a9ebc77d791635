"""How an arm protects a run; the only module of the demo that calls stablekit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

import stablekit
from stablekit.errors import StablekitError
from stablekit_cli.demo._arms import CLIP, PRESET, Arm, ArmError, plugin_name
from stablekit_monitors import Recorder, SpikeMonitor

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from stablekit_cli.demo._workload import Workload

__all__ = ["Incident", "Protection", "Reading", "Stopped", "check", "plugin_names", "protect"]

MAX_NORM = 1.0
"""Threshold of the arm ``clip``."""
MONITOR = "spike-monitor"


class Stopped(RuntimeError):
    """The protection ended the run; the message says why."""


@dataclass(frozen=True)
class Incident:
    """Something the protection reported about one step."""

    kind: str
    message: str
    tensors: tuple[str, ...]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What an arm knows about the step it has just made."""

    grad_norm: float
    threshold: float | None = None
    """Gradient norm above which the arm clips, where it has one."""
    clipped: float = 0.0
    """Fraction of the tensors that were clipped; 0 or 1 for a threshold on the global norm."""
    skipped: bool = False
    incidents: tuple[Incident, ...] = ()


class Protection(Protocol):
    """One step of an optimizer under an arm."""

    def step(self, loss: torch.Tensor) -> None:
        """Update the parameters from their gradients: the part whose time is measured."""

    def reading(self) -> Reading:
        """Return what happened in that step; not timed."""

    def close(self) -> None:
        """End: nothing more will be stepped."""


class Plain:
    """No protection."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = optimizer

    def step(self, loss: torch.Tensor) -> None:
        """Step."""
        self._optimizer.step()

    def reading(self) -> Reading:
        """Return the norm of the gradients, which a plain step leaves as they were."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return Reading(torch.nn.utils.get_total_norm(gradients).item())

    def close(self) -> None:
        """Do nothing."""


class TorchClip:
    """torch's own ``clip_grad_norm_``, as in most training loops."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = optimizer
        self._norm = torch.zeros(())

    def step(self, loss: torch.Tensor) -> None:
        """Clip, then step."""
        self._norm = torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
        self._optimizer.step()

    def reading(self) -> Reading:
        """Return the norm before clipping."""
        norm = self._norm.item()
        return Reading(norm, MAX_NORM, float(norm > MAX_NORM))

    def close(self) -> None:
        """Do nothing."""


class Wrapped:
    """An optimizer with stablekit attached: the loop only reports its loss.

    Besides what the arm names a spike monitor watches and, into a folder, a recorder records.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        chain: tuple[str, ...],
        folder: Path | None,
    ) -> None:
        witnesses: list[Any] = [] if folder is None else [Recorder(folder)]
        if MONITOR not in map(plugin_name, chain):
            witnesses.insert(0, SpikeMonitor())
        self._session = stablekit.attach(optimizer, *chain, *witnesses, model=model, log_every=1)
        self._optimizer = optimizer
        self._skipped = 0.0
        self._last_event: object = None

    def step(self, loss: torch.Tensor) -> None:
        """Observe the loss, then step.

        Raises:
            Stopped: A plugin refused to go on.
        """
        self._session.observe(loss=loss)
        try:
            self._optimizer.step()
        except StablekitError as error:
            raise Stopped(str(error)) from error

    def reading(self) -> Reading:
        """Return the session's metrics and what it has emitted since the last reading."""
        metrics = self._session.metrics()
        before, self._skipped = self._skipped, metrics["steps_skipped"]
        skipped = self._skipped > before
        clipped = [value for key, value in metrics.items() if key.endswith("/clipped")]
        return Reading(
            grad_norm=metrics["grad_norm"],
            threshold=_smallest(metrics, "/threshold"),
            clipped=max(clipped, default=0.0),
            skipped=skipped,
            incidents=self._news(),
        )

    def close(self) -> None:
        """Leave the optimizer, so that the log is complete."""
        self._session.detach()

    def _news(self) -> tuple[Incident, ...]:
        fresh = []
        for event in reversed(self._session.events):
            if event is self._last_event:
                break
            fresh.append(event)
        if fresh:
            self._last_event = fresh[0]
        return tuple(Incident(e.kind, e.message, e.tensors, e.data) for e in reversed(fresh))


def plugin_names() -> list[str]:
    """Return the names that an arm may give to stablekit."""
    return [*sorted(stablekit.available()), PRESET]


def protect(
    arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None = None
) -> Protection:
    """Attach an arm to an optimizer; one with stablekit records into the folder, if given."""
    if arm.protected:
        return Wrapped(model, optimizer, arm.chain, folder)
    return (TorchClip if arm.label == CLIP else Plain)(model, optimizer)


def check(arm: Arm, workload: Workload) -> None:
    """Make one step of the arm on a model nobody trains: a bad keyword is found at once.

    Raises:
        ArmError: stablekit does not accept the arm.
    """
    model = workload.model()
    try:
        protection = protect(arm, model, workload.optimizer(model))
        loss = workload.loss(model, torch.Generator().manual_seed(0))
        loss.backward()
        protection.step(loss.detach())
        protection.close()
    except (Stopped, StablekitError, ValueError, TypeError) as error:
        raise ArmError(f"arm {arm.label!r}: {error}") from error


def _smallest(metrics: dict[str, float], suffix: str) -> float | None:
    """Return the smallest finite metric of that name: of several clippers, the one that binds."""
    values = [value for key, value in metrics.items() if key.endswith(suffix)]
    return min((value for value in values if math.isfinite(value)), default=None)
