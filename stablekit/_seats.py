"""Plugins in the order the user listed them, each called under its own name."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import TYPE_CHECKING, Any, final

import pluggy

from stablekit import hookspecs
from stablekit.errors import (
    AttachError,
    HookError,
    PluginError,
    StablekitError,
    StablekitWarning,
)
from stablekit.hookspecs import HOOKS, Plugin, hooks_of
from stablekit.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stablekit._layout import Layout
    from stablekit._round import Round
    from stablekit._selection import Selection
    from stablekit.events import Event

_STEP_HOOKS = HOOKS[1:7]


@final
class Seat:
    """A plugin's place in one session: what pluggy registers in its stead."""

    def __init__(self, plugin: Plugin, selection: Selection | None) -> None:
        """Take in a plugin, after pluggy has checked its hooks."""
        check_hooks(plugin)
        if selection is not None and "loss" in getattr(plugin, "needs", ()):
            raise AttachError(
                f"{plugin.name!r} changes the loss, which all parameters share: it cannot be"
                f" restricted to some with {selection!r}"
            )
        self.plugin = plugin
        self.name = plugin.name
        self.selection = selection
        self.hooks = hooks_of(plugin)
        self.number = 0
        self.is_told = False
        for hook in self.hooks:
            setattr(self, hook, self._entry(hook))

    def chosen(self, layout: Layout) -> tuple[int, ...] | None:
        """Return the positions the plugin is restricted to, None for all."""
        return None if self.selection is None else self.selection.positions(layout)

    def take_back(self, session: object) -> None:
        """Fire ``on_detach`` if ``on_attach`` was called, whether or not it came to its end."""
        if not self.is_told or "on_detach" not in self.hooks:
            return
        try:
            self._entry("on_detach")(session=session)
        except StablekitError as error:
            warnings.warn(
                f"{self.name!r} could not take back what it did at attach: {error}",
                StablekitWarning,
                stacklevel=2,
            )

    def _view(self, moment: Round) -> Step:
        named = self.selection is not None and self.selection.include is not None
        return Step(moment, self.name, self.chosen(moment.layout), named=named)

    def _entry(self, hook: str) -> Callable[..., None]:
        function = getattr(self.plugin, hook)
        takes = frozenset(inspect.signature(function).parameters)

        def run(**arguments: Any) -> None:  # noqa: ANN401 - the hook's own arguments
            try:
                function(**{key: value for key, value in arguments.items() if key in takes})
            except StablekitError:
                raise
            except Exception as error:
                raise PluginError(
                    f"plugin {self.name!r} failed in {hook} at step {self.number}:"
                    f" {type(error).__name__}: {error}"
                ) from error

        def step_hook(moment: Round) -> None:
            self.number = moment.number
            run(step=self._view(moment))

        def event_hook(event: Event, step: Step) -> None:
            self.number = event.step
            moment = step._round
            run(event=event, step=self._view(moment))

        def attach_hook(session: object) -> None:
            self.is_told = True
            run(session=session)

        if hook == "on_event":
            return event_hook
        if hook == "on_attach":
            return attach_hook
        return step_hook if hook in _STEP_HOOKS else run


@final
class Seats:
    """All seats of a session and the calls to them."""

    def __init__(self, pairs: Iterable[tuple[Plugin, Selection | None]]) -> None:
        """Seat plugins in order.

        Raises:
            AttachError: Two plugins have the same name.
            HookError: A hook does not exist or takes arguments it cannot be given.
        """
        self._seats: list[Seat] = []
        for plugin, selection in pairs:
            if plugin.name in self.by_name:
                raise AttachError(
                    f"two plugins are named {plugin.name!r}; give one of them another name=..."
                )
            self._seats.append(Seat(plugin, selection))
        self._calls = self._ordered()

    @property
    def by_name(self) -> dict[str, Any]:
        """Plugins by name, in the listed order."""
        return {seat.name: seat.plugin for seat in self._seats}

    def has(self, hook: str) -> bool:
        """Tell whether anyone implements a hook."""
        return bool(self._calls[hook])

    def needing(self, what: str, layout: Layout) -> list[int]:
        """Return the positions of the tensors of which some plugin announced to need a read."""
        positions: set[int] = set()
        for seat in self._seats:
            if what in getattr(seat.plugin, "needs", ()):
                chosen = seat.chosen(layout)
                positions.update(range(len(layout.names)) if chosen is None else chosen)
        return sorted(positions)

    def restrictions(self) -> list[tuple[str, str]]:
        """Return what each plugin is restricted to, in words."""
        return [(seat.name, repr(seat.selection or "all")) for seat in self._seats]

    def settle(self, layout: Layout) -> None:
        """Resolve every restriction now, so that a pattern without match is heard of at attach."""
        for seat in self._seats:
            seat.chosen(layout)

    def call(self, hook: str, moment: Round) -> None:
        """Fire a hook that takes a step."""
        for function in self._calls[hook]:
            function(moment)

    def attached(self, session: object) -> None:
        """Fire ``on_attach``; if one raises, what it and those before it did is taken back."""
        try:
            self._tell("on_attach", session=session)
        except BaseException:
            for seat in self._seats:
                seat.take_back(session)
            raise

    def detached(self, session: object) -> None:
        """Fire ``on_detach``."""
        self._tell("on_detach", session=session)

    def metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Fire ``on_metrics``."""
        self._tell("on_metrics", number=number, metrics=metrics)

    def event(self, event: Event, step: Step) -> None:
        """Fire ``on_event``."""
        self._tell("on_event", event=event, step=step)

    def _tell(self, hook: str, **arguments: Any) -> None:  # noqa: ANN401 - the hook's own arguments
        for function in self._calls[hook]:
            function(**arguments)

    def _ordered(self) -> dict[str, list[Callable[..., None]]]:
        """Return every hook's implementations as pluggy orders plugins registered last to first."""
        manager = pluggy.PluginManager("stablekit")
        manager.add_hookspecs(hookspecs)
        for seat in reversed(self._seats):
            manager.register(seat.plugin, seat.name)
        entries = {seat.name: seat for seat in self._seats}
        return {
            hook: [
                getattr(entries[call.plugin_name], hook)
                for call in reversed(getattr(manager.hook, hook).get_hookimpls())
            ]
            for hook in HOOKS
        }


def check_hooks(plugin: Plugin) -> None:
    """Have pluggy verify names and arguments of a plugin's hooks.

    Raises:
        HookError: One is misspelt, unmarked or malformed.
    """
    unmarked = [
        name
        for name in HOOKS
        if callable(getattr(plugin, name, None))
        and not hasattr(getattr(plugin, name), "stablekit_impl")
    ]
    if unmarked:
        raise HookError(
            f"plugin {plugin.name!r} has a method {unmarked[0]} without @stablekit.hookimpl, which"
            " would never be called; mark it, or give it another name"
        )
    manager = pluggy.PluginManager("stablekit")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise HookError(f"plugin {plugin.name!r}: {error}{_hint(plugin)}") from error
    for caller in manager.get_hookcallers(plugin) or ():
        if any(call.hookwrapper or call.wrapper for call in caller.get_hookimpls()):
            raise HookError(
                f"plugin {plugin.name!r}: {caller.name} is a hook wrapper, which stablekit does not"
                " have; list a plugin before and one after instead"
            )


def _hint(plugin: Plugin) -> str:
    marked = [n for n in dir(plugin) if hasattr(getattr(plugin, n, None), "stablekit_impl")]
    hints = [
        f"; {name} is not a hook, did you mean {nearest[0]}?"
        for name in marked
        if name not in HOOKS and (nearest := difflib.get_close_matches(name, HOOKS, n=1))
    ]
    return "".join(hints) + f" (hooks are: {', '.join(HOOKS)})"
