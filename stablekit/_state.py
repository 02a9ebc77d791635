"""Session state in checkpoints: what it looks like, how it is checked, where it travels."""

from __future__ import annotations

import inspect
import sys
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stablekit._callers import is_checkpointing
from stablekit._saved import VERSION, check_frame
from stablekit.errors import StateError, StateWarning
from stablekit.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from stablekit._session import Session
    from stablekit.hookspecs import Plugin

KEY = "stablekit"


def dump(session: Session) -> dict[str, Any]:
    """Return the state of a session and its plugins."""
    return {
        "version": VERSION,
        "number": session.number,
        "updates": session.updates,
        "skipped": session.skipped,
        "clipped": session.latest.clipped_steps(),
        "events": [
            _plain(event.as_dict(), f"events[{i}]") for i, event in enumerate(session.events)
        ],
        "plugins": _entries(session),
    }


def load(session: Session, state: Mapping[str, Any], *, strict: bool) -> None:
    """Check a state completely, then take it over.

    Raises:
        StateError: The state does not fit; nothing was changed.
    """
    check(session, state, strict=strict)
    take_over(session, state)


def take_over(session: Session, state: Mapping[str, Any]) -> None:
    """Continue from a state that :func:`check` accepted."""
    session.mail.drop()
    for name, plugin in session.plugins.items():
        if name in state["plugins"]:
            load_plugin(plugin, state["plugins"][name]["state"])
    session.restore(state, [Event.from_dict(event) for event in state["events"]])


def check(session: Session, state: Mapping[str, Any], *, strict: bool) -> None:
    """Refuse a state that :func:`load` could not take over, and warn if it is of other plugins.

    Nothing is changed yet: every plugin is as before afterwards.

    Raises:
        StateError: The message names the field.
    """
    check_frame(state)
    saved, ours = _to_restore(state["plugins"]), _entries(session)
    if strict and set(saved) != set(ours):
        raise StateError(
            f"the state is of the plugins {sorted(saved)}, the session has {sorted(ours)};"
            " pass strict=False to start the others afresh"
        )
    for name in ours:
        if name in saved:
            _try(name, session.plugins[name], saved[name]["state"])
    _compare(session, ours, saved)


def settings(plugin: Plugin) -> dict[str, Any]:
    """Return the constructor arguments a plugin keeps under their own names, plain values only."""
    parameters = inspect.signature(type(plugin)).parameters
    kept = {key: getattr(plugin, key, None) for key in parameters if hasattr(plugin, key)}
    plain = (bool, int, float, str, type(None))
    return {key: value for key, value in kept.items() if isinstance(value, plain)}


def register(session: Session) -> list[RemovableHandle]:
    """Let the state travel in the first optimizer's ``state_dict()`` under the key "stablekit"."""
    optimizer = session.optimizers[0]
    pending: list[Mapping[str, Any]] = []

    def settle(_: Optimizer) -> None:
        session.give_back()

    def save(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[KEY] = session.state_dict()

    def verify(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        pending.clear()
        if KEY not in state_dict:
            if not is_checkpointing(sys._getframe()):
                warn_of_missing(stacklevel=5)
            elif not session.is_restored:  # it comes through another channel, if it comes
                session.awaits_state = True
            return state_dict
        check(session, state_dict[KEY], strict=False)
        pending.append(state_dict[KEY])
        return {key: value for key, value in state_dict.items() if key != KEY}

    def apply(_: Optimizer) -> None:
        if pending:
            take_over(session, pending.pop())

    if optimizer not in _with_state_hooks(session):
        # Wrappers such as pytorch_optimizer's Lookahead have step hooks and nothing else.
        warnings.warn(
            f"state_dict() of {type(optimizer).__name__} calls no hooks, so plugin state is not in"
            " it: save session.state_dict() next to it",
            StateWarning,
            stacklevel=4,
        )
        return []
    return [
        *(one.register_state_dict_pre_hook(settle) for one in _with_state_hooks(session)),
        optimizer.register_state_dict_post_hook(save),
        optimizer.register_load_state_dict_pre_hook(verify),
        optimizer.register_load_state_dict_post_hook(apply),
    ]


def warn_of_missing(*, stacklevel: int) -> None:
    """Warn that an optimizer continues from a checkpoint and its plugins do not."""
    warnings.warn(
        "the optimizer state that was loaded holds no stablekit state: plugins keep theirs. If it"
        " was saved through another channel, call session.load_state_dict(...); with"
        " torch.distributed.checkpoint save stablekit.checkpoint.SessionState(session) too",
        StateWarning,
        stacklevel=stacklevel,
    )


def _entries(session: Session) -> dict[str, Any]:
    """Return what there is to save of each plugin that has something to save."""
    return _to_restore(
        {
            name: {"settings": settings(plugin), "state": state_of(plugin)}
            for name, plugin in session.plugins.items()
        }
    )


def _to_restore(plugins: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out plugins that have neither settings nor state."""
    return {name: entry for name, entry in plugins.items() if entry["settings"] or entry["state"]}


def _with_state_hooks(session: Session) -> list[Optimizer]:
    return [one for one in session.optimizers if hasattr(one, "_optimizer_state_dict_post_hooks")]


def state_of(plugin: Plugin) -> dict[str, Any]:
    """Return a plugin's own state, copied."""
    save: Callable[[], dict[str, Any]] | None = getattr(plugin, "state_dict", None)
    state = save() if save is not None else {}
    return {key: _plain(value, f"{plugin.name}.{key}") for key, value in state.items()}


def _plain(value: Any, path: str) -> Any:  # noqa: ANN401 - any state value
    """Return a value that ``torch.load(weights_only=True)`` accepts, tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):  # of numpy
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise StateError(f"state field {path} is a {type(value).__name__}; plain values are expected")


def load_plugin(plugin: Plugin, state: Mapping[str, Any]) -> None:
    """Give a plugin the state it saved."""
    restore: Callable[[Mapping[str, Any]], None] | None = getattr(plugin, "load_state_dict", None)
    if restore is not None:
        restore(state)


def go_back(plugin: Plugin, state: Mapping[str, Any]) -> None:
    """Have a plugin follow a run that goes back to where the plugin had this state."""
    follow: Callable[[Mapping[str, Any]], None] | None = getattr(plugin, "go_back", None)
    if follow is not None:
        follow(state)
    else:
        load_plugin(plugin, state)


def _try(name: str, plugin: Plugin, state: Mapping[str, Any]) -> None:
    """Load a plugin's state and put the old one back, so that a bad one is found beforehand."""
    path = f"plugins.{name}.state"
    before = state_of(plugin)
    if set(state) != set(before):
        odd = sorted(map(str, set(state) ^ set(before)))
        raise StateError(
            f"state field {path} must have the keys {sorted(before)}; differs in {odd}"
        )
    try:
        load_plugin(plugin, state)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise StateError(f"state field {path}: {error}") from error
    finally:
        load_plugin(plugin, before)


def _compare(session: Session, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Warn once about every way in which the saved session was another one."""
    said = []
    if added := [name for name in ours if name not in saved]:
        said.append(f"start afresh, not in the checkpoint: {', '.join(added)}")
    if removed := [name for name in saved if name not in ours]:
        said.append(f"dropped, not attached now: {', '.join(removed)}")
    for name in ours:
        before = saved.get(name, {}).get("settings", {})
        now = ours[name]["settings"]
        changed = [key for key in now if key in before and before[key] != now[key]]
        said += [f"{name}.{key} stays {now[key]!r}, was {before[key]!r}" for key in changed]
        said += _strangers(name, saved.get(name, {}).get("state", {}), session)
    if said:
        warnings.warn(
            f"the checkpoint is of another session: {'; '.join(said)}", StateWarning, stacklevel=5
        )


def _strangers(plugin: str, state: Mapping[str, Any], session: Session) -> list[str]:
    """Say which saved values belong to parameters that nobody here knows by that name."""
    known = {*session.current_layout()[0].names, "all"}
    tables = [table for table in state.values() if isinstance(table, dict)]
    names = {name for table in tables for name in table}
    lost = sorted(names - known)
    if not lost:
        return []
    return [
        f"{plugin} has state of {len(lost)} of {len(names)} parameters that are unknown here"
        f" ({lost[0]}); attach with the same model= as when it was saved"
    ]
