"""How an optimizer's step treats loss scales: the fused ones take them as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer


def is_fused(optimizer: Optimizer) -> bool:
    """Tell whether all groups step through kernels that take ``grad_scale``, ``found_inf``."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused", True) for group in optimizer.param_groups
    )


@final
class AmpState:
    """What a GradScaler left on fused optimizers before it called their step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Read ``grad_scale`` and ``found_inf``.

        Raises:
            AttachError: Several optimizers share a session and gradients are still scaled.
        """
        self.fused = all(is_fused(optimizer) for optimizer in optimizers)
        self.scale: Tensor | None = getattr(optimizers[0], "grad_scale", None)
        self.found_inf: Tensor | None = getattr(optimizers[0], "found_inf", None)
        if self.scale is not None and len(optimizers) > 1:
            raise AttachError(
                "gradients of a session with several optimizers are still multiplied by the loss"
                " scale; call scaler.unscale_(optimizer) for each of them before the first step()"
            )

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
