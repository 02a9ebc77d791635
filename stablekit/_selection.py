"""Restricting a plugin to some parameters, by name patterns or group numbers."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, final

from stablekit.errors import NoEffectWarning

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit._layout import Layout


@final
class Selection:
    """Parameters whose name matches ``include``, not ``exclude``, in one of ``groups``."""

    def __init__(
        self,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        groups: int | Iterable[int] | None,
    ) -> None:
        """Keep the patterns; shell wildcards, matched against whole canonical names.

        Raises:
            ValueError: Nothing was given to select by.
        """
        self.include = _patterns(include)
        self.exclude = _patterns(exclude) or ()
        self.groups = (groups,) if isinstance(groups, int) else groups and tuple(groups)
        if self.include is None and not self.exclude and self.groups is None:
            raise ValueError("only(...) needs include=, exclude= or groups=, got none of them")
        self._names: tuple[str, ...] | None = None
        self._positions: tuple[int, ...] = ()

    def positions(self, layout: Layout) -> tuple[int, ...]:
        """Return the positions selected in a layout.

        Raises:
            ValueError: No parameter is selected.
        """
        if layout.names is not self._names:
            self._names = layout.names
            self._positions = self._match(layout)
        return self._positions

    def _match(self, layout: Layout) -> tuple[int, ...]:
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in layout.names):
                warnings.warn(
                    f"pattern {pattern!r} matches no parameter; names are like"
                    f" {', '.join(layout.names[:3])}",
                    NoEffectWarning,
                    stacklevel=2,
                )
        chosen = tuple(i for i, name in enumerate(layout.names) if self._takes(name, layout, i))
        if not chosen and layout.names:
            raise ValueError(f"no parameter is selected by {self!r}")
        return chosen

    def _takes(self, name: str, layout: Layout, i: int) -> bool:
        if self.groups is not None and layout.groups[i] not in self.groups:
            return False
        if self.include is not None and not any(fnmatchcase(name, p) for p in self.include):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def __repr__(self) -> str:
        """Show what was asked for."""
        return f"include={self.include}, exclude={self.exclude}, groups={self.groups}"


@final
class Restricted:
    """A plugin together with the parameters it is allowed to see; made by ``only``."""

    def __init__(self, plugin: Any, selection: Selection) -> None:  # noqa: ANN401 - any plugin form
        """Pair a plugin, in any of the forms ``attach`` takes, with a selection."""
        self.plugin = plugin
        self.selection = selection


def only(
    plugin: Any,  # noqa: ANN401 - any plugin form
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    groups: int | Iterable[int] | None = None,
) -> Restricted:
    """Restrict a plugin to some parameters: it sees and changes no others.

    Args:
        plugin: an instance, a name, or any other form that ``attach`` takes.
        include: patterns of names to take, e.g. ``"*.weight"``; None takes all.
        exclude: patterns of names to leave out, e.g. ``["head.*", "*norm*"]``.
        groups: numbers of parameter groups; with several optimizers they count on.

    Raises:
        ValueError: Nothing was given, or (at attach) nothing is selected.

    Example:
        >>> import torch, stablekit
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> head_free = stablekit.only("agc", exclude="1.*")
        >>> session = stablekit.attach(optimizer, head_free, model=model)
    """
    return Restricted(plugin, Selection(include, exclude, groups))


def _patterns(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return (given,) if isinstance(given, str) else given if given is None else tuple(given)
