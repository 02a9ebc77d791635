"""How an optimizer's step treats loss scales: the fused ones take them as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from stablekit._sharding import cuts_like_first
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
        if frame is None:
            return None
        # Asking for the locals of a frame keeps them alive in it: never ask those of user code.
        is_of_torch = str(frame.f_globals.get("__name__")).startswith("torch.")
        caller = frame.f_locals.get("self") if is_of_torch else None
        if isinstance(caller, GradScaler) and caller.is_enabled():
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


def refuse_lonely(
    scaler: GradScaler | None, optimizer: Optimizer, *, has_groups: bool, is_cut: bool
) -> None:
    """Refuse a scaler that keeps one rank from a step in which others wait for it.

    It does not call the step of an optimizer that is not fused where it found an overflow; torch
    lets it look beyond its own rank only as far as the first gradient is cut.

    Args:
        scaler: what calls the step.
        optimizer: whose step it is.
        has_groups: whether other ranks have other parameters.
        is_cut: whether parameters are spread over ranks.

    Raises:
        AttachError: Ranks may disagree about overflows.
    """
    if scaler is None or is_fused(optimizer) or hasattr(scaler, "process_group"):
        return
    if has_groups or (is_cut and not _is_cut_alike(optimizer)):
        raise AttachError(
            f"{type(scaler).__name__} judges overflows by what a rank holds, so some ranks would"
            f" skip {type(optimizer).__name__}.step() while others wait for them in it. Make the"
            " optimizer with fused=True, or use"
            " torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )


def _is_cut_alike(optimizer: Optimizer) -> bool:
    """Tell whether torch reduces overflows over all ranks that share a gradient."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                kinds.setdefault((param.device, param.grad.dtype), []).append(param)
    return all(cuts_like_first(same) for same in kinds.values())


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
            scaler: what calls its step, where there are several optimizers or ranks.

        Raises:
            AttachError: Several optimizers share a session and gradients are still scaled.
        """
        self.fused = all(is_fused(optimizer) for optimizer in optimizers)
        self.scale: Tensor | None = getattr(stepping, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(stepping, "found_inf", None)
        self._scaler, self._optimizers = scaler, optimizers
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

    def ok(self, true: Tensor) -> Tensor:
        """Return a 0-dim bool: the scaler found no overflow; the one given where there is none."""
        if self.found_inf is None:
            return true
        return (self.found_inf == 0).view(()).to(true.device, non_blocking=True)

    def flag(self, device: torch.device) -> Tensor:
        """Return a vector of one element, positive where the scaler found an overflow."""
        if self.found_inf is None:
            return torch.zeros(1, device=device)
        return self.found_inf.view(1).to(device, torch.float32, non_blocking=True)

    def agree(self, flags: Tensor, *, tell: bool) -> None:
        """Take over what the scaler of any rank found.

        GradScaler itself looks at the local parts (ShardedGradScaler does not, and DTensors that
        are all cut alike are dealt with by torch).

        Args:
            flags: the sum of the ranks' flags.
            tell: let the scaler of this rank know, so that all lower their scale alike.
        """
        if self.found_inf is None:
            return
        found = (flags > 0).float()
        self.found_inf = found.view_as(self.found_inf).to(self.found_inf.device, non_blocking=True)
        if tell and self._scaler is not None:
            for own in _flags_of(self._scaler, self._optimizers):
                own.copy_(torch.maximum(own, found.to(own.device, non_blocking=True)))

    def overflowed(self, *, host: bool) -> bool:
        """Tell whether the scaler found an overflow; False where only the device knows."""
        return host and self.found_inf is not None and bool(self.found_inf > 0)


def _found_in_any(scaler: GradScaler, optimizers: Sequence[Optimizer]) -> Tensor | None:
    found = _flags_of(scaler, optimizers)
    if not found:
        return None
    home = found[0].device
    return torch.stack([flag.view(()).to(home, non_blocking=True) for flag in found]).amax()


def _flags_of(scaler: GradScaler, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    states = [scaler._per_optimizer_states.get(id(optimizer), {}) for optimizer in optimizers]
    return [flag for state in states for flag in state.get("found_inf_per_device", {}).values()]
