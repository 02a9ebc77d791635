"""Optimizers and counters with which the checks catch what a plugin does behind their back."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - the documented way in

import stablekit
from stablekit.gradients import Gradients
from stablekit.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

_NOT_THE_PLUGIN = tuple(f"{Path(str(one.__file__)).parent}{os.sep}" for one in (torch, stablekit))
_ANNOUNCED: dict[str, tuple[type, str]] = {
    "unit_norms": (Gradients, "unit_norms"),
    "weight_unit_norms": (Gradients, "weight_unit_norms"),
    "amaxes": (Gradients, "amaxes"),
    "elements": (Gradients, "edit"),
    "parameters": (Step, "norms_of"),
}


@contextlib.contextmanager
def reads_seen() -> Iterator[set[str]]:
    """Collect which of the reads that a plugin announces in ``needs`` are made within a block."""
    seen: set[str] = set()

    def watched(need: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the method it stands for
            seen.add(need)
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for need, (owner, method) in _ANNOUNCED.items():
            stand_in = watched(need, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, stand_in))
        yield seen


class PlainAdam(torch.optim.Optimizer):
    """An optimizer with Adam's moments that itself reads nothing on the host."""

    def __init__(self, params: Any) -> None:  # noqa: ANN401 - as torch
        """Take parameters as any optimizer."""
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a small step along the gradients, and follow them with the moments."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            self.state[param]["exp_avg"].lerp_(param.grad, 0.1)
            self.state[param]["exp_avg_sq"].lerp_(param.grad.square(), 0.001)
        torch._foreach_add_(params, [p.grad for p in params], alpha=-0.01)


class FusedAdam(PlainAdam):
    """The same, saying of itself what fused optimizers say."""

    _step_supports_amp_scaling = True


class HostReads(TorchDispatchMode):
    """Notes where in a plugin the value of a tensor is asked for on the host."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch is not annotated here
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - as torch
        types: Any,  # noqa: ANN401 - as torch
        args: Any = (),  # noqa: ANN401 - as torch
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - as torch
        if "_local_scalar_dense" in str(func):
            self.seen.append(_caller(sys._getframe(1)))
        return func(*args, **(kwargs or {}))


def _caller(frame: FrameType | None) -> str:
    """Return file and line of the innermost frame that is neither torch's nor stablekit's."""
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_PLUGIN):
        frame = frame.f_back
    return "no line of Python" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
