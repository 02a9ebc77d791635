"""Optimizers and a counter with which the checks catch a value on its way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - the documented way in

if TYPE_CHECKING:
    from collections.abc import Mapping


class PlainSGD(torch.optim.Optimizer):
    """An optimizer that itself reads nothing on the host."""

    def __init__(self, params: Any) -> None:  # noqa: ANN401 - as torch
        """Take parameters as any optimizer."""
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a small step along the gradients."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_add_(params, [p.grad for p in params], alpha=-0.01)


class FusedSGD(PlainSGD):
    """The same, saying of itself what fused optimizers say."""

    _step_supports_amp_scaling = True


class HostReads(TorchDispatchMode):
    """Counts the operations by which a tensor's value reaches the host."""

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
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
