"""Making surgeries on a model, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit_layers import _catalogue, _marks
from stablekit_layers.surgery import Surgery

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["apply", "resolve"]

Model = TypeVar("Model", bound=nn.Module)
Form: TypeAlias = "Surgery | str | Mapping[str, Any] | Sequence[Form]"
"""What stands for surgeries; mappings and lists are what YAML and configurations hold."""


def apply(model: Model, *surgeries: Form) -> Model:
    """Change a model's layers, in place, before its optimizer exists.

    What was done is recorded on the model and, where it has one, in its ``config``, so that
    ``save_pretrained`` writes it; the model gets a ``config`` of its own. Load what was saved with
    ``stablekit_layers.load``.

    Most surgeries change the function that the model computes: a trained model has to be trained
    again. Whether a model was trained, or an optimizer already holds its parameters, cannot be seen
    here: parameters that are added now are unknown to an optimizer that exists. A session that
    knows the model warns of that, and ``check(model, optimizer)`` refuses it.

    Args:
        model: what is changed: not wrapped, not compiled, not quantised, without adapters.
        surgeries: instances, names as ``"qk-norm"``, names with arguments as
            ``"qk-norm:per=projection"`` or ``{"qk-norm": {"per": "projection"}}``, entries of
            ``config.stablekit_surgery``, or lists of these; made in this order.

    Returns:
        The same model.

    Raises:
        AttachError: A surgery is made twice, conflicts with another, or cannot be made on this
            model. Nothing was changed.
        UnknownPluginError: There is no surgery of this name.
        TypeError: What is given is no model, or stands for no surgery.
        ValueError: A string or mapping is malformed.

    Example:
        >>> from torch import nn
        >>> from stablekit_layers import ScaledWeightStandardization
        >>> model = apply(nn.Sequential(nn.Linear(4, 4)), ScaledWeightStandardization())
        >>> [surgery.name for surgery in model.stablekit_surgery]
        ['scaled-ws']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "apply changes a model that was built, as LlamaForCausalLM(config) or by"
            f" from_pretrained; got {model!r}"
        )
    chosen = resolve(surgeries)
    _refuse_wrapped(model)
    _refuse_marked(model, chosen)
    _refuse_combination([*_marks.applied(model), *chosen])
    for surgery in chosen:
        surgery.check(model)
    before = {id(param) for param in model.parameters()}
    for surgery in chosen:
        surgery.apply_to(model)
    _marks.mark_added(model, before)
    _marks.record(model, chosen)
    return model


def resolve(surgeries: Iterable[Form]) -> list[Surgery]:
    """Return the surgeries that all forms stand for, in order."""
    return [surgery for given in surgeries for surgery in _resolve(given)]


def _resolve(given: Any) -> Iterator[Surgery]:  # noqa: ANN401 - see the forms
    if isinstance(given, str):
        yield _catalogue.from_text(given)
    elif isinstance(given, Mapping):
        yield _catalogue.from_mapping(given)
    elif isinstance(given, (list, tuple)):
        yield from resolve(given)
    elif isinstance(given, type):
        raise TypeError(f"a surgery is given as an instance: write {given.__name__}(...)")
    elif isinstance(given, Surgery):
        yield given
    else:
        raise TypeError(
            "a surgery is given as an instance, as 'name', as 'name:key=value', or as"
            " {'name': {...}}; an instance has name, conflicts, arguments, check and apply_to; got"
            f" {given!r}"
        )


def _refuse_combination(surgeries: Sequence[Surgery]) -> None:
    for first, second in combinations(surgeries, 2):
        is_ours = type(first) is type(second) and type(first).__module__.startswith(__package__)
        if first.name == second.name or is_ours:
            raise AttachError(f"{second.name} cannot be made twice on one model")
        if second.name in first.conflicts or first.name in second.conflicts:
            raise AttachError(f"{first.name} and {second.name} contradict each other: choose one")


def _refuse_marked(model: nn.Module, chosen: Sequence[Surgery]) -> None:
    """Refuse a plain model that was made from the configuration of one that is operated on."""
    asked = _marks.marked(model)
    if asked and not _marks.applied(model) and asked != [_marks.entry(one) for one in chosen]:
        raise AttachError(
            "the configuration of this model says that its weights belong to a model with"
            f" {', '.join(one['name'] for one in asked)}: load them with stablekit_layers.load"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise AttachError(f"operate on the model before {type(model).__name__} wraps it")
    if modules.is_compiled(model):
        raise AttachError("operate on the model before torch.compile")
    if any(hasattr(param, "full_tensor") for param in model.parameters()):
        raise AttachError("operate on the model before its parameters are sharded")
    if getattr(model, "is_quantized", False) or any(map(_is_quantised, model.parameters())):
        raise AttachError("the weights of this model are quantised: operate on full precision")
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise AttachError("this model has adapters (PEFT): operate on the base model before it")


def _is_quantised(param: nn.Parameter) -> bool:
    return not (param.is_floating_point() or param.is_complex()) or hasattr(param, "quant_state")
