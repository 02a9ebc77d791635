"""Trained factors of heads and features: their modules, the hooks that use them, their folding."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stablekit.errors import AttachError

__all__ = [
    "Gain",
    "fold_columns",
    "fold_rows",
    "is_transposed",
    "put_after",
    "put_before",
    "refuse_computed",
    "scale_slices",
    "take_away",
    "weight_of",
]

if TYPE_CHECKING:
    from collections.abc import Iterable


def scale_slices(x: Tensor, gains: Tensor) -> Tensor:
    """Return ``x`` with each of its ``len(gains)`` contiguous slices multiplied by its gain.

    Args:
        x: ``[..., heads * head_dim]``.
        gains: ``[heads]``.

    Example:
        >>> scale_slices(torch.ones(4), torch.tensor([1.0, 2.0]))
        tensor([1., 1., 2., 2.])
    """
    slices: Tensor = x.unflatten(-1, (gains.numel(), -1))
    return (slices * gains.to(x.dtype).unsqueeze(-1)).flatten(-2)


@final
class Gain(nn.Module):
    """One trained factor for each head or feature, 1 at first.

    Example:
        >>> Gain(2, like=torch.ones(1))(torch.ones(4)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, count: int, *, like: Tensor) -> None:
        """Make the factors on the device and in the dtype of ``like``."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, device=like.device, dtype=like.dtype))

    def reset_parameters(self) -> None:
        """Set the factors to 1, as torch asks of modules that were made without values."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with its slices scaled."""
        return scale_slices(x, self.weight)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return str(self.weight.numel())


def put_before(module: nn.Module, change: nn.Module) -> None:
    """Let ``change`` act on the input of ``module``; a copy's hook uses the copy's ``change``."""
    module.register_forward_pre_hook(partial(_before, change))


def put_after(module: nn.Module, change: nn.Module) -> None:
    """Let ``change`` act on the output of ``module``, after what is there already."""
    module.register_forward_hook(partial(_after, change))


def take_away(module: nn.Module, change: nn.Module) -> None:
    """Remove what the two functions above did."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, partial) and hook.args[0] is change:
                del hooks[key]


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a weight is ``[in, out]``, as in the ``Conv1D`` of GPT-2."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as ``[out, in]``, a view of what it is stored as."""
    weight = cast("Tensor", module.weight)
    return weight.transpose(0, 1) if is_transposed(module) else weight


def refuse_computed(layers: Iterable[nn.Module]) -> None:
    """Refuse layers whose weight is computed from another one, which cannot be written to."""
    computed = next((one for one in layers if parametrize.is_parametrized(one, "weight")), None)
    if computed is not None:
        raise AttachError(
            f"the weight of {computed} is computed from another one (torch.nn.utils.parametrize):"
            " fold or remove that first"
        )


@torch.no_grad()
def fold_columns(module: nn.Module, gains: Tensor) -> None:
    """Multiply slices of the weight's inputs by gains, in place."""
    weight = weight_of(module)
    weight.copy_(scale_slices(weight, gains))


@torch.no_grad()
def fold_rows(module: nn.Module, gains: Tensor) -> None:
    """Multiply slices of the weight's outputs, and the bias, by gains, in place."""
    weight = weight_of(module).transpose(0, 1)
    weight.copy_(scale_slices(weight, gains))
    if module.bias is not None:
        bias = cast("Tensor", module.bias)
        bias.copy_(scale_slices(bias, gains))


def _before(change: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    del module
    return (change(args[0]), *args[1:])


def _after(change: nn.Module, module: nn.Module, args: object, output: Tensor) -> Tensor:
    del module, args
    return cast("Tensor", change(output))
