"""Loading and checking models that were operated on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from stablekit.errors import StateError
from stablekit_layers import _catalogue, _marks
from stablekit_layers._apply import apply

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from stablekit_layers.surgery import Surgery

__all__ = ["check", "load"]

Model = TypeVar("Model", bound="nn.Module")


def check(model: nn.Module) -> None:
    """Raise unless a model has the surgeries that its configuration says its weights need.

    Also refused are adapters (PEFT) on a projection whose output a surgery normalises or scales:
    they would be added after that, and merging them would change what the model computes.

    Raises:
        StateError: So it is; what the model computes is not what was, or will be, trained.

    Example:
        >>> from torch import nn
        >>> check(nn.Linear(2, 2))
    """
    asked = _marks.marked(model)
    made = [_marks.entry(surgery) for surgery in _marks.applied(model)]
    if hasattr(_marks.bare(model), "config") and asked != made:
        raise StateError(
            f"the configuration of this model asks for the surgeries {_names(asked)}, made were"
            f" {_names(made)}: load it with stablekit_layers.load"
        )
    for name, module in model.named_modules():
        if name.endswith("base_layer") and _is_changed(module):
            raise StateError(
                f"what adapters put out is added to {name} after the norm or gain of a surgery:"
                " leave this projection out of their targets"
            )


def _is_changed(module: nn.Module) -> bool:
    """Tell whether a module has a hook that a surgery put there, an object or a ``partial``."""
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(
        getattr(hook, "func", type(hook)).__module__.startswith("stablekit_layers")
        for hook in hooks
    )


def load(
    cls: type[Model],
    path: str | os.PathLike[str],
    *,
    surgeries: Iterable[Surgery] = (),
    **kwargs: Any,  # noqa: ANN401 - arguments of from_pretrained
) -> Model:
    """Return a model of transformers from a folder that a model with surgeries was saved to.

    The plain model is built, the surgeries that the saved configuration names are made on it, and
    the weights are loaded: all of them, and no others.

    Args:
        cls: a model class, or one of the ``AutoModel`` family.
        path: what ``from_pretrained`` takes.
        surgeries: instances of those that no installed distribution provides by name, equal to
            those that were made.
        **kwargs: likewise: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        StateError: The configuration names no surgery, or weights are missing or left over.

    Example:
        ``model = stablekit_layers.load(LlamaForCausalLM, "out/checkpoint-500")``
    """
    config = kwargs.pop("config", None) or _config(path, kwargs)
    asked = list(getattr(config, _marks.KEY, None) or ())
    if not asked:
        raise StateError(
            f"{str(path)!r} was saved without a surgery: use {cls.__name__}.from_pretrained"
        )
    given = list(surgeries)
    chosen = [_made(one, given) for one in asked]
    config = _cleared(config)
    operated = _operated(_concrete(cls, config), chosen)
    model, found = operated.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    wrong = {key: sorted(map(str, found[key])) for key in _PROBLEMS if found.get(key)}
    if wrong:
        raise StateError(f"{str(path)!r} does not fit {cls.__name__} with {_names(asked)}: {wrong}")
    model.__class__ = operated.__mro__[1]
    return cast("Model", model)


_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _made(one: dict[str, Any], given: Iterable[Surgery]) -> Surgery:
    """Return the given surgery that is this entry, else one from the catalogue."""
    equal = (surgery for surgery in given if _marks.entry(surgery) == one)
    return next(equal, None) or _catalogue.create(one["name"], **one["arguments"])


def _config(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    auto = import_module("transformers").AutoConfig
    known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    return auto.from_pretrained(path, **{k: kwargs[k] for k in known if k in kwargs})


def _cleared(config: Any) -> Any:  # noqa: ANN401 - a configuration of transformers
    """Return the configuration of the plain model; the surgeries write theirs into it again."""
    plain = type(config).from_dict(
        {key: value for key, value in config.to_dict().items() if key not in _OURS}
    )
    plain._name_or_path = config._name_or_path
    return plain


_OURS = (_marks.KEY, _marks.BARRIER)


def _concrete(cls: Any, config: Any) -> Any:  # noqa: ANN401 - a class of models, or of AutoModels
    """Return the class that an AutoModel class stands for."""
    if not hasattr(cls, "from_config"):
        return cls
    with torch.device("meta"):
        return type(cls.from_config(config))


def _operated(cls: Any, surgeries: list[Surgery]) -> Any:  # noqa: ANN401
    """Return a class whose models have the surgeries before weights are loaded into them."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        cls.__init__(self, *args, **kwargs)
        apply(self, *surgeries)

    body = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _names(entries: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['name']} {one['arguments']}" for one in entries) or "none"
