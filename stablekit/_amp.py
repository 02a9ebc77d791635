"""How an optimizer's step treats loss scales: the fused ones take them as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from torch.optim import Optimizer

_NEAR = 8


def is_fused(optimizer: Optimizer) -> bool:
    """Tell whether all groups step through kernels that take ``grad_scale``, ``found_inf``."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused", True) for group in optimizer.param_groups
    )


def scaler_above(frame: FrameType | None) -> GradScaler | None:
    """Return the GradScaler that made this call, if one is near on the stack.

    It leaves its findings only on fused optimizers. Of several optimizers that step together, the
    first must know what it found in the others.
    """
    for _ in range(_NEAR):
        caller = None if frame is None else frame.f_locals.get("self")
        if frame is None or (isinstance(caller, GradScaler) and caller.is_enabled()):
            return caller
        frame = frame.f_back
    return None


def refuse_scaled(optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
    """Refuse gradients of one of several optimizers that are still times the loss scale.

    Raises:
        AttachError: They are; a norm over all optimizers would mix two units.
    """
    state = {} if scaler is None else scaler._per_optimizer_states.get(id(optimizer), {})
    is_ready = scaler is not None and state.get("stage", OptState.READY) is OptState.READY
    if is_ready or getattr(optimizer, "grad_scale", None) is not None:
        raise AttachError(
            f"gradients of {type(optimizer).__name__}, one of several optimizers in a session, are"
            " still multiplied by the loss scale; call scaler.unscale_(optimizer) for each of them"
            " before the first step()"
        )


@final
class AmpState:
    """What a GradScaler knows of the gradients as the first of its optimizers steps."""

    def __init__(
        self, optimizers: Sequence[Optimizer], stepping: Optimizer, scaler: GradScaler | None
    ) -> None:
        """Read ``grad_scale`` and ``found_inf``.

        Args:
            optimizers: all of the session.
            stepping: the one that steps first.
            scaler: what calls its step, where there are several optimizers.

        Raises:
            AttachError: Several optimizers share a session and gradients are still scaled.
        """
        self.fused = all(is_fused(optimizer) for optimizer in optimizers)
        self.scale: Tensor | None = getattr(stepping, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(stepping, "found_inf", None)
        if len(optimizers) > 1:
            for optimizer in optimizers:
                # The scaler itself unscales the one whose step it calls.
                refuse_scaled(optimizer, None if optimizer is stepping else scaler)
            if scaler is not None:
                self.found_inf = _found_in_any(scaler, optimizers)

    def unscale(self, device: torch.device) -> Tensor | None:
        """Return the factor that makes gradients true, None where they are."""
        if self.scale is None:
            return None
        return self.scale.double().reciprocal().float().to(device, non_blocking=True)

    def ok(self, device: torch.device) -> Tensor:
        """Return a 0-dim bool: the scaler found no overflow."""
        if self.found_inf is None:
            return torch.ones((), dtype=torch.bool, device=device)
        return (self.found_inf == 0).view(()).to(device, non_blocking=True)

    def overflowed(self, *, host: bool) -> bool:
        """Tell whether the scaler found an overflow; False where only the device knows."""
        return host and self.found_inf is not None and bool(self.found_inf > 0)


def _found_in_any(scaler: GradScaler, optimizers: Sequence[Optimizer]) -> Tensor | None:
    states = [scaler._per_optimizer_states.get(id(optimizer), {}) for optimizer in optimizers]
    found = [flag for state in states for flag in state.get("found_inf_per_device", {}).values()]
    if not found:
        return None
    home = found[0].device
    return torch.stack([flag.view(()).to(home, non_blocking=True) for flag in found]).amax()
