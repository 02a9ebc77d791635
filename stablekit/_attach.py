"""The one line that puts plugins to work, and finding what it left behind."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.optim import Optimizer

from stablekit._engines import refuse_engine
from stablekit._layout import parameters_of
from stablekit._reduce_groups import ReduceGroups
from stablekit._seats import Seats
from stablekit._session import Session
from stablekit._specs import resolve
from stablekit._torch_hooks import Wire, has_native_hooks
from stablekit.errors import AttachError, StateWarning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.distributed import ProcessGroup

_INSIDE = ("optimizer", "optim", "original_optimizer")


def attach(
    optimizer: Any,  # noqa: ANN401 - an optimizer, a wrapper around one, or a list of them
    *plugins: Any,  # noqa: ANN401 - instances, names, strings with keywords, mappings
    model: nn.Module | None = None,
    log_every: int | None = None,
    device_mode: bool | None = None,
    reduce_groups: Sequence[ProcessGroup] | Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Session:
    """Attach plugins to an optimizer, in place, and return the session.

    Nothing else changes: loop, scheduler, Accelerate and Trainer go on with the same object.

    Args:
        optimizer: any ``torch.optim.Optimizer``, a wrapper that holds one, or a list of optimizers
            that step together.
        *plugins: each an instance, a name (``"zclip"``), a string (``"zclip:z_thresh=3.0"``), a
            mapping (``{"zclip": {"z_thresh": 3.0}}``) or any of these in :func:`only`. They act in
            this order. ``"recommended"`` stands for nonfinite-guard and zclip.
        model: gives parameters their names, and the loss if its outputs have a ``.loss``.
        log_every: hand out metrics every so many steps; None is 1 on CPU, 10 elsewhere; 0 never.
        device_mode: never read the host between such steps; None decides by the parameters' device.
        reduce_groups: further process groups over which gradient norms add up, for parameters that
            are whole on this rank while other ranks have others: a list of groups for all of them
            (the stages of a pipeline), or groups by name pattern (``{"*.experts.*": group}``).
        dry_run: decide and record everything, change nothing.

    Raises:
        AttachError: There is no torch optimizer, it has a session already, or two plugins share
            a name.
        HookError: A plugin has a hook that does not exist.
        UnknownPluginError: No distribution provides a plugin of that name.
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> session = stablekit.attach(optimizer, "nonfinite-guard", "zclip", model=model)
        >>> list(session.plugins)
        ['nonfinite-guard', 'zclip']
    """
    if log_every is not None and (not isinstance(log_every, int) or log_every < 0):
        raise ValueError(f"log_every must be an integer of at least 0, got {log_every!r}")
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not given:
        raise AttachError("there is no optimizer in the list to attach to")
    optimizers = [innermost(one) for one in given]
    for one in optimizers:
        _refuse_second(one)
    if len({id(one) for one in optimizers}) < len(optimizers):
        raise AttachError("an optimizer is in the list twice; list each of them once")
    _refuse_shared(optimizers)
    seats = Seats(resolve(plugins))
    _warn_of_lost_state(optimizers, seats)
    return Session(
        optimizers,
        seats,
        model=model,
        log_every=log_every,
        device_mode=device_mode,
        reduce_groups=ReduceGroups(reduce_groups),
        dry_run=dry_run,
    )


def wrap(optimizer: Any, *plugins: Any, **options: Any) -> Any:  # noqa: ANN401 - as attach
    """Attach plugins to an optimizer and return the same optimizer object.

    Takes the arguments of :func:`attach` and raises what it raises.

    Example:
        >>> import torch, stablekit
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = stablekit.wrap(torch.optim.AdamW(layer.parameters()), "recommended")
        >>> type(optimizer).__name__
        'AdamW'
    """
    attach(optimizer, *plugins, **options)
    return optimizer


def session(optimizer: Any) -> Session:  # noqa: ANN401 - as attach
    """Return the session attached to an optimizer, looking through wrappers.

    Raises:
        AttachError: Nothing is attached to it.

    Example:
        >>> import torch, stablekit
        >>> optimizer = stablekit.wrap(torch.optim.SGD([torch.zeros(2)]), "global-norm")
        >>> stablekit.session(optimizer).plugins["global-norm"].max_norm
        1.0
    """
    first = optimizer[0] if isinstance(optimizer, (list, tuple)) and optimizer else optimizer
    found = _attached(innermost(first))
    if found is None:
        raise AttachError(f"no session is attached to this {type(first).__name__}")
    return found


def innermost(candidate: Any) -> Optimizer:  # noqa: ANN401 - an optimizer or a wrapper
    """Return the outermost object with native hooks, looking inside only those without.

    Raises:
        AttachError: There is none, or it belongs to an engine that steps by itself.
    """
    current, seen = candidate, []
    while not has_native_hooks(current):
        refuse_engine(current)
        seen.append(current)
        inner = next((getattr(current, name) for name in _INSIDE if hasattr(current, name)), None)
        if inner is None or any(inner is other for other in seen):
            raise AttachError(
                f"expected a torch.optim.Optimizer or an object that holds one as"
                f" .optimizer, .optim or .original_optimizer; got {type(candidate).__name__}"
            )
        current = inner
    found: Optimizer = current
    return found


def _attached(optimizer: Optimizer) -> Session | None:
    for hook in optimizer._optimizer_step_pre_hooks.values():
        wire = getattr(hook, "__self__", None)
        if isinstance(wire, Wire):
            return wire.session
    return None


def _refuse_shared(optimizers: list[Optimizer]) -> None:
    params = [id(param) for param in parameters_of(optimizers)]
    if len(params) != len(set(params)):
        raise AttachError(
            "a parameter is held twice by the optimizers of this session: its gradient would count"
            " and be scaled twice. Give every parameter to one optimizer"
        )


def _refuse_second(optimizer: Optimizer) -> None:
    before = _attached(optimizer)
    if before is not None:
        raise AttachError(
            f"this {type(optimizer).__name__} has a session already, with"
            f" {', '.join(before.plugins) or 'no plugin'}; detach it first, or list all plugins in"
            " one call"
        )


def _warn_of_lost_state(optimizers: list[Optimizer], seats: Seats) -> None:
    has_state = any(getattr(plugin, "state_dict", None) for plugin in seats.by_name.values())
    if has_state and any(_has_stepped(optimizer) for optimizer in optimizers):
        warnings.warn(
            "the optimizer already has state, but plugins start afresh: a checkpoint loaded before"
            " attach() has lost its plugin state. Attach first and call optimizer.load_state_dict"
            "(...) after, or call session.load_state_dict(checkpoint['stablekit'])",
            StateWarning,
            stacklevel=3,
        )


def _has_stepped(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has state of a run; Adagrad makes some before its first step."""
    return any(
        not isinstance(state, dict) or float(state.get("step", 1)) > 0
        for state in optimizer.state.values()
    )
