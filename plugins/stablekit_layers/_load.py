"""Loading models that were operated on."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from stablekit.errors import StateError, StateWarning
from stablekit_layers import _catalogue, _marks
from stablekit_layers._apply import apply

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from stablekit_layers.surgery import Surgery

__all__ = ["load"]

Model = TypeVar("Model", bound="nn.Module")


def load(
    cls: type[Model],
    path: str | os.PathLike[str],
    *,
    surgeries: Iterable[Surgery] = (),
    new_head: bool = False,
    **kwargs: Any,  # noqa: ANN401 - arguments of from_pretrained
) -> Model:
    """Return a model of transformers from a folder that a model with surgeries was saved to.

    The plain model is built, the surgeries that the saved configuration names are made on it, and
    the weights are loaded: all of them, and no others. It is in eval mode, as ``from_pretrained``
    leaves it.

    Args:
        cls: a model class, or one of the ``AutoModel`` family.
        path: what ``from_pretrained`` takes.
        surgeries: instances of those that no installed distribution provides by name, equal to
            those that were made.
        new_head: whether what is outside the base model may differ from what was saved: another
            task, or another number of labels. A warning names what is new and what is left out.
        **kwargs: likewise: ``dtype``, ``device_map``, ``attn_implementation``, or values of the
            configuration as ``num_labels``.

    Raises:
        StateError: The configuration names no surgery, or weights are missing or left over.

    Warns:
        StateWarning: The head is new.

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
    config, kwargs = _cleared(config, kwargs)
    operated = _operated(_concrete(cls, config), chosen)
    if new_head:
        kwargs["ignore_mismatched_sizes"] = True
    model, found = operated.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    _judge(found, model, f"{str(path)!r} does not fit {cls.__name__}", asked, new_head=new_head)
    model.__class__ = operated.__mro__[1]
    return cast("Model", model)


_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _judge(
    found: Any,  # noqa: ANN401 - what from_pretrained tells of loading
    model: Any,  # noqa: ANN401 - a model of transformers
    subject: str,
    asked: list[dict[str, Any]],
    *,
    new_head: bool,
) -> None:
    """Refuse weights that are missing or left over, and tell of those that may be."""
    wrong = {key: sorted(found[key], key=str) for key in _PROBLEMS if found.get(key)}
    if not wrong:
        return
    is_head = not wrong.get("error_msgs") and not any(
        _is_in_body(_name(one), model) for key in _PROBLEMS[:3] for one in wrong.get(key, ())
    )
    if not (new_head and is_head):
        hint = "; new_head=True takes the base model's weights alone" if is_head else ""
        listed = {key: [_name(one) for one in wrong[key]] for key in wrong}
        raise StateError(f"{subject} with {_marks.words(asked)}: {listed}{hint}")
    fresh = [_name(one) for key in _REPLACED for one in wrong.get(key, ())]
    unused = [_name(one) for one in wrong.get("unexpected_keys", ())]
    warnings.warn(
        f"{type(model).__name__} has a head of its own: new, and to be trained, are"
        f" {', '.join(fresh) or 'none'}; left out were {', '.join(unused) or 'none'}",
        StateWarning,
        stacklevel=3,
    )


_REPLACED = ("missing_keys", "mismatched_keys")


def _name(found: Any) -> str:  # noqa: ANN401 - a name, or a name and two shapes
    return str(found[0] if isinstance(found, tuple) else found)


def _is_in_body(name: str, model: Any) -> bool:  # noqa: ANN401 - a model of transformers
    """Tell whether weights belong to the base model, which a model without a head is itself."""
    body = model.base_model
    if body is model:
        return name.partition(".")[0] in dict(model.named_children())
    return name.startswith(f"{model.base_model_prefix}.")


def _made(one: dict[str, Any], given: Iterable[Surgery]) -> Surgery:
    """Return the given surgery that is this entry, else one from the catalogue."""
    equal = (surgery for surgery in given if _marks.entry(surgery) == one)
    return next(equal, None) or _catalogue.create(one["name"], **one["arguments"])


def _config(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    auto = import_module("transformers").AutoConfig
    known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    return auto.from_pretrained(path, **{k: kwargs[k] for k in known if k in kwargs})


def _cleared(config: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    """Return the configuration of the plain model, and the arguments that are not for it.

    The surgeries write theirs into it again.
    """
    saved = config.to_diff_dict()  # as save_pretrained writes it: what is left out follows settings
    content = {key: value for key, value in saved.items() if key not in _OURS}
    settings = {key: value for key, value in kwargs.items() if key not in _OF_LOADING}
    plain, left = type(config).from_dict(content, return_unused_kwargs=True, **settings)
    plain._name_or_path = config._name_or_path
    return plain, {**left, **{key: kwargs[key] for key in _OF_LOADING if key in kwargs}}


_OURS = (_marks.KEY, _marks.BARRIER)
_OF_LOADING = (
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
)
"""Arguments whose name a configuration has too, that ``from_pretrained`` must see itself."""


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
