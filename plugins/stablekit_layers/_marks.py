"""What a model says of the surgeries it has had: on itself, and in the configuration it saves."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit_layers.surgery import Surgery

__all__ = [
    "BARRIER",
    "added",
    "applied",
    "bare",
    "entry",
    "forget",
    "mark_added",
    "marked",
    "record",
    "unmark",
    "words",
]

KEY = "stablekit_surgery"
"""Attribute of the model (what was done) and of its configuration (what its weights need)."""

BARRIER = "experts_implementation"
"""The field of a saved configuration that makes transformers 5 refuse to build the plain model.

Unexpected weights are a warning there; an unknown value of this field is an error for every class,
whichever attention is asked for.
"""

ADDED = "stablekit_added"
"""Attribute of a module: names of those of its own parameters that were added to the model.

Of the module, since what wraps, copies or shards a model keeps its modules. A session reads it.
"""

_WORDS = (
    "none: this checkpoint was changed by stablekit_layers ({names}) and computes another function"
    " without that; load it with stablekit_layers.load, as in"
    " model = stablekit_layers.load({cls}, path)"
)


def entry(surgery: Surgery) -> dict[str, Any]:
    """Return what is written of one surgery."""
    return {"name": surgery.name, "arguments": dict(surgery.arguments)}


def bare(model: nn.Module) -> nn.Module:
    """Return a model without what DDP and ``torch.compile`` put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def applied(model: nn.Module) -> list[Surgery]:
    """Return the surgeries that were made on this object, in order."""
    return list(getattr(bare(model), KEY, ()))


def marked(model: nn.Module) -> list[dict[str, Any]]:
    """Return the surgeries that the model's configuration asks for, in order."""
    return list(getattr(getattr(bare(model), "config", None), KEY, None) or ())


def mark_added(model: nn.Module, before: set[int]) -> None:
    """Note which parameters were not among those of these ids before."""
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        names = [key for key, param in own if id(param) not in before]
        if names:
            vars(module)[ADDED] = (*vars(module).get(ADDED, ()), *names)


def added(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that surgeries added, by name."""
    return {
        f"{name}.{key}" if name else key: param
        for name, module in bare(model).named_modules()
        for key, param in module.named_parameters(recurse=False)
        if key in vars(module).get(ADDED, ())
    }


def words(entries: list[dict[str, Any]]) -> str:
    """Return entries as a message names them."""
    return ", ".join(f"{one['name']} {one['arguments']}" for one in entries) or "none"


def record(model: nn.Module, surgeries: Iterable[Surgery]) -> None:
    """Add surgeries to what the model and its configuration say."""
    _write(model, [*applied(model), *surgeries])


def unmark(model: nn.Module, name: str) -> None:
    """Take one surgery off again, once the plain model computes the same without it."""
    _write(model, [one for one in applied(model) if one.name != name])


def _write(model: nn.Module, surgeries: list[Surgery]) -> None:
    setattr(model, KEY, surgeries)
    config = getattr(model, "config", None)
    if config is None:
        return
    config = _own(model, config)
    forget(config)
    if surgeries:
        setattr(config, KEY, copy.deepcopy([entry(one) for one in surgeries]))
        names = ", ".join(one.name for one in surgeries)
        setattr(config, BARRIER, _WORDS.format(names=names, cls=type(model).__name__))


def forget(config: Any) -> None:  # noqa: ANN401 - a configuration of transformers
    """Take what ``record`` wrote out of a configuration."""
    for key in (KEY, BARRIER):
        if key in vars(config):
            delattr(config, key)


def _own(model: nn.Module, config: Any) -> Any:  # noqa: ANN401 - a configuration of transformers
    """Give a model a configuration of its own: another may have been made from the same one."""
    own = copy.deepcopy(config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own
    return own
