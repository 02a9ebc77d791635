"""The parameters that multiply queries and keys, and the refusal of those that cannot be scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stablekit.errors import AttachError
from stablekit.forward import modules

if TYPE_CHECKING:
    from stablekit.forward import AttentionLayer

__all__ = ["ClippedLayer", "Gain", "clipped_layer"]


@final
@dataclass(frozen=True)
class Gain:
    """A parameter that multiplies queries or keys along one of its dims."""

    parameter: str
    """Its name."""
    share: float
    """Its exponent: how much of a factor on logits it takes."""
    dim: int
    """The dim that runs over queries or keys."""
    start: int
    """Where they begin in it."""
    width: int
    """How many there are of them."""
    is_offset: bool
    """Whether it is kept as its difference from 1, as in Gemma's norms."""


@final
@dataclass(frozen=True)
class ClippedLayer:
    """One attention layer and what scales its logits."""

    name: str
    heads: int
    """How many query heads."""
    groups: int
    """How many sets of heads can be scaled apart from each other."""
    gains: tuple[Gain, ...]


def clipped_layer(
    layer: AttentionLayer, names: dict[int, list[str]], *, alpha: float
) -> ClippedLayer:
    """Return what scales the logits of a layer.

    Args:
        layer: where queries and keys are made.
        names: :func:`stablekit.forward.modules.names_of_parameters` of its model.
        alpha: share of the queries.

    Raises:
        AttachError: Something stands in the way, as an adapter does, or a tied or frozen weight.
    """
    query, key = _maker(layer.query), _maker(layer.key)
    parts = 3 if layer.is_fused else 1
    widths = [_width(layer.name, module, parts) for module in (query, key)]
    length = layer.head_dim or widths[0]
    units = [width // length for width in widths]
    groups = min(units)
    if any(width % length for width in widths) or not groups:
        raise AttachError(f"{layer.name} makes {widths} numbers, not heads of {length}")
    if layer.heads % groups or any(unit % groups for unit in units):
        raise AttachError(f"{layer.name} has {layer.heads} heads, but makes {units} of them")
    if query is key and not layer.is_fused:
        found = _gains(layer.name, query, names, 0.5, 0, widths[0])
    else:
        start = widths[0] if layer.is_fused else 0
        found = _gains(layer.name, query, names, alpha, 0, widths[0])
        found += _gains(layer.name, key, names, 1 - alpha, start, widths[1])
    return ClippedLayer(layer.name, layer.heads, groups, tuple(found))


def _maker(module: nn.Module) -> nn.Module:
    """Return what multiplies last."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def _width(name: str, module: nn.Module, parts: int) -> int:
    """Return how many numbers a module makes of which queries, keys and values are equal parts."""
    _refuse_adapted(name, module)
    return modules.width_of(module) // parts


def _refuse_adapted(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        raise AttachError(
            f"qk-clip cannot scale the weights of {name}: {kind} is an adapter over a weight that"
            " is not trained. Merge it, or train without qk-clip"
        )
    if hasattr(module, "parametrizations"):
        raise AttachError(
            f"qk-clip cannot scale the weights of {name}: they are computed by a parametrization;"
            " remove it with torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise AttachError(
            f"qk-clip needs modules whose weight makes queries and keys; in {name} a {kind} makes"
            " them, which has no parameter of that name"
        )
    if (
        not weight.is_floating_point()
        or weight.dtype.itemsize < 2
        or hasattr(weight, "quant_state")
    ):
        raise AttachError(
            f"qk-clip cannot scale the weights of {name}: they are quantised ({weight.dtype})"
        )


def _gains(
    name: str, module: nn.Module, names: dict[int, list[str]], share: float, start: int, width: int
) -> list[Gain]:
    """Return what scales a part of a module's output: weight and, if there is one, bias."""
    found = []
    for part in ("weight", "bias"):
        param = module._parameters.get(part)
        if param is None:
            continue
        known = names.get(id(param), [])
        if len(known) != 1:
            raise AttachError(
                f"qk-clip cannot scale the {part} of {name}: it is used as {' and '.join(known)}"
                if known
                else f"the {part} of {name} is no parameter of the model that was attached"
            )
        if not param.requires_grad:
            raise AttachError(
                f"qk-clip cannot scale {known[0]}: it is frozen. Leave its layer out by naming the"
                " others with query= and key="
            )
        dim = 1 if part == "weight" and _is_transposed(name, module) else 0
        is_offset = part == "weight" and param.ndim == 1 and _is_offset(name, module)
        found.append(Gain(known[0], share, dim, start, width, is_offset))
    return found


def _is_transposed(name: str, module: nn.Module) -> bool:
    """Tell whether a weight is ``(in, out)``, as in the Conv1D of GPT-2."""
    weight = module._parameters["weight"]
    assert weight is not None
    if isinstance(module, nn.Linear) or weight.ndim == 1:
        return False
    # FSDP2 replaces the class of what it shards by one that inherits from it.
    if weight.ndim == 2 and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return True
    raise AttachError(
        f"qk-clip knows how to scale the output of nn.Linear, of transformers' Conv1D and of norms;"
        f" queries or keys of {name} come from a {type(module).__name__}"
    )


@torch.no_grad()
def _is_offset(name: str, norm: nn.Module) -> bool:
    """Find out whether a norm multiplies by its weight or by 1 plus it."""
    weight = norm._parameters["weight"]
    assert weight is not None
    home = "cpu" if weight.is_meta else weight.device
    x = torch.linspace(1, 2, weight.numel(), device=home).view(1, 1, 1, -1)

    def made(gain: float) -> Tensor:
        given = {"weight": torch.full((weight.numel(),), gain, device=home)}
        if norm._parameters.get("bias") is not None:
            given["bias"] = torch.zeros(weight.numel(), device=home)
        result: Tensor = functional_call(norm, given, (x,))
        return result

    at_zero, at_one = made(0.0), made(1.0)
    if bool(at_one.any()) and (not bool(at_zero.any()) or torch.allclose(at_one, 2 * at_zero)):
        return bool(at_zero.any())
    raise AttachError(
        f"qk-clip cannot scale what {name} makes: {type(norm).__name__} multiplies neither by its"
        " weight nor by 1 plus it"
    )
