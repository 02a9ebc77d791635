"""The norm that surgeries add, and where its result replaces an output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NormalisedInput", "NormalisedOutput", "RMSNorm", "like", "rms_normalise"]


def rms_normalise(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return ``gain * x / sqrt(mean(x ** 2) + eps)`` over the last dim, as transformers rounds it.

    The division is made in float32 (float64 for float64), the product in the gain's dtype.

    Example:
        >>> rms_normalise(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
        tensor([0.8485, 1.1314])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


@final
class RMSNorm(nn.Module):
    """Divide vectors by their root mean square and multiply them by a learned gain, 1 at first.

    The arithmetic is that of ``LlamaRMSNorm`` and ``Qwen3RMSNorm``, bit for bit.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0])).detach()
        tensor([0.8485, 1.1314])
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def reset_parameters(self) -> None:
        """Set the gain to 1, as torch asks of modules that were made without values."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised vectors in the dtype of ``x`` times that of the gain."""
        return rms_normalise(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{self.weight.numel()}, eps={self.eps}"


def like(weights: nn.Module, width: int, *, eps: float) -> RMSNorm:
    """Return a norm on the device and in the dtype of another module's weights.

    Example:
        >>> like(nn.Linear(2, 2, dtype=torch.bfloat16), 4, eps=1e-6).weight.dtype
        torch.bfloat16
    """
    param = next(weights.parameters())
    return RMSNorm(width, eps=eps, device=param.device, dtype=param.dtype)


@final
class NormalisedOutput:
    """A forward hook that puts an output, or a part of it, through norms.

    An object and not a closure: ``copy.deepcopy`` and pickling of a model then give a copy whose
    hook uses the copy's norm.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> norm = like(layer, 2, eps=0.0)
        >>> _ = layer.register_forward_hook(NormalisedOutput([(norm, 2)]))
        >>> torch.allclose(layer(torch.ones(2)).pow(2).mean(), torch.tensor(1.0))
        True
    """

    def __init__(self, parts: Sequence[tuple[nn.Module | None, int]]) -> None:
        self.parts = list(parts)
        """Norm and length of the parts of the last dim, in order; None leaves a part alone."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        """Return what takes the place of the output."""
        if len(self.parts) == 1:
            return _through(self.parts[0][0], output)
        pieces = output.split([length for _, length in self.parts], dim=-1)
        norms = [norm for norm, _ in self.parts]
        return torch.cat([_through(n, x) for n, x in zip(norms, pieces, strict=True)], dim=-1)


@final
class NormalisedInput:
    """A forward pre-hook that puts the first input through a norm, an object for the same reason.

    Example:
        >>> layer = nn.Identity()
        >>> _ = layer.register_forward_pre_hook(NormalisedInput(RMSNorm(2, eps=0.0)))
        >>> torch.allclose(layer(torch.ones(2) * 3), torch.ones(2))
        True
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what takes the place of the positional inputs."""
        return (self.norm(args[0]), *args[1:])


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Return x after a norm that may be narrower than x, as one of a head is."""
    if norm is None:
        return x
    width = cast("Tensor", norm.weight).shape[0]
    normalised: Tensor = norm(x.unflatten(-1, (-1, width)))
    return normalised.flatten(-2)
