"""Finding modules in a model by name, and tensors in what they return."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stablekit._layout import canonical
from stablekit.errors import AttachError

if TYPE_CHECKING:
    from stablekit import Session

__all__ = [
    "device_of",
    "is_compiled",
    "matching",
    "model_of",
    "named",
    "names_of_parameters",
    "pattern",
    "tensors_in",
    "whole",
    "width_of",
]

_NAMED = 5
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def model_of(session: Session, plugin: str) -> nn.Module:
    """Return the model of a session without what DDP and ``torch.compile`` put around it.

    Raises:
        AttachError: The session has none.

    Example:
        >>> import stablekit
        >>> layer = nn.Linear(2, 2)
        >>> session = stablekit.attach(torch.optim.SGD(layer.parameters()), model=layer)
        >>> model_of(session, "my-plugin") is layer
        True
    """
    model = session.model
    if model is None:
        raise AttachError(
            f"{plugin} looks at forward passes, so it must know the model: pass model=... to"
            " stablekit.attach"
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by name, "" for itself; of a wrapped one the wrapper.

    Example:
        >>> list(named(nn.Sequential(nn.Linear(2, 2))))
        ['', '0']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        found.setdefault(".".join(parts), module)
    return found


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return the names that plugins see of each parameter, by its ``id``; several where tied.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> names_of_parameters(nn.Sequential(layer, layer))[id(layer.bias)]
        ['0.bias', '1.bias']
    """
    found: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        known = found.setdefault(id(param), [])
        if canonical(name) not in known:
            known.append(canonical(name))
    return found


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model, or a module in it, was given to ``torch.compile``.

    Example:
        >>> is_compiled(nn.Linear(2, 2))
        False
    """
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def pattern(argument: str, value: str | None) -> str | None:
    """Return a constructor argument that names modules.

    Raises:
        TypeError: It is neither a string nor None.

    Example:
        >>> pattern("layers", "blocks.*")
        'blocks.*'
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{argument} must be a string or None, got {value!r}")
    return value


def matching(model: nn.Module, wanted: str, *, argument: str) -> dict[str, nn.Module]:
    """Return the modules whose name matches a pattern, in which ``*`` stands for one part.

    Raises:
        AttachError: There is none.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> list(matching(model, "blocks.*", argument="layers"))
        ['blocks.0', 'blocks.1']
    """
    modules = named(model)
    found = {name: module for name, module in modules.items() if _matches(name, wanted)}
    if not found:
        nearest = ", ".join(_nearest(wanted, [name for name in modules if name]))
        raise AttachError(
            f"{argument}={wanted!r} matches no module of {type(model).__name__}; the nearest names"
            f" are {nearest or '(none)'}, and * stands for one part between dots"
        )
    return found


def _nearest(wanted: str, names: list[str]) -> list[str]:
    """Return the names most like a pattern, a number in a name being as good as any other."""
    alike: dict[str, str] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), name)
    found = difflib.get_close_matches(wanted, alike, n=_NAMED, cutoff=0.0)
    return [alike[name] for name in found]


def _matches(name: str, wanted: str) -> bool:
    if not name or not wanted:
        return name == wanted
    parts, patterns = name.split("."), wanted.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's first parameter is, the CPU if it has none.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    return next((param.device for param in module.parameters()), torch.device("cpu"))


def width_of(module: nn.Module) -> int:
    """Return the last dim of what a linear layer, a norm or a sequence of such puts out, else 0.

    Example:
        >>> width_of(nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6)))
        6
    """
    if isinstance(module, nn.Sequential) and len(module):
        return width_of(module[-1])
    width = getattr(module, "out_features", getattr(module, "nf", None))
    weight = getattr(module, "weight", None)
    if width is None and isinstance(weight, Tensor) and weight.ndim == 1:
        width = weight.numel()
    return width if isinstance(width, int) else 0


def tensors_in(output: Any) -> list[Tensor]:  # noqa: ANN401 - any module's output
    """Return the floating point tensors in a module's output, one level deep, detached.

    Example:
        >>> tensors_in((torch.ones(1), None, torch.tensor([2])))
        [tensor([1.])]
    """
    if isinstance(output, Tensor):
        items: list[Any] = [output]
    elif isinstance(output, Mapping):
        items = list(output.values())
    elif isinstance(output, Sequence) and not isinstance(output, str):
        items = list(output)
    else:
        items = []
    return [t.detach() for t in items if isinstance(t, Tensor) and t.is_floating_point()]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that tensor parallelism may have cut, as one and detached.

    Example:
        >>> whole(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
