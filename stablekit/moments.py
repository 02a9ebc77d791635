"""What optimizers call their moments and step counts in ``optimizer.state``, and resetting them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, final

from torch import Tensor

from stablekit._sharding import local
from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from stablekit.scalars import Flag
    from stablekit.step import Step

__all__ = ["FIRST", "SECOND", "Resets", "clear_", "first", "rewind_", "second"]

FIRST: tuple[str, ...] = ("exp_avg", "momentum_buffer", "moment1", "m")
"""State keys of a running average of gradients, most common first."""

SECOND: tuple[str, ...] = ("exp_avg_sq", "square_avg", "sum", "moment2", "v")
"""State keys of a running average (or sum) of squared gradients, most common first."""


def first(state: Mapping[str, Any]) -> Tensor | None:
    """Return one parameter's first moment, None where its optimizer keeps none.

    Of a sharded one the part that this rank holds.

    Args:
        state: ``optimizer.state[parameter]``.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.grad = torch.ones(2)
        >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> optimizer.step()
        >>> first(optimizer.state[p])
        tensor([1., 1.])
    """
    return _find(state, FIRST)


def second(state: Mapping[str, Any]) -> Tensor | None:
    """Return one parameter's second moment, None where its optimizer keeps none.

    Of a sharded one the part that this rank holds.

    Args:
        state: ``optimizer.state[parameter]``.

    Example:
        >>> second({"momentum_buffer": Tensor([1.0])}) is None
        True
    """
    return _find(state, SECOND)


def clear_(state: Mapping[str, Any], *, when: Flag = True) -> tuple[str, ...]:
    """Set one parameter's moments to zero, in place, and return the keys of those there are.

    Args:
        state: ``optimizer.state[parameter]``.
        when: whether to; a 0-dim tensor where that is decided on the device.

    Example:
        >>> state = {"step": 3, "exp_avg": Tensor([2.0]), "exp_avg_sq": Tensor([4.0])}
        >>> clear_(state), state["exp_avg"]
        (('exp_avg', 'exp_avg_sq'), tensor([0.]))
    """
    keys = tuple(key for key in (*FIRST, *SECOND) if isinstance(state.get(key), Tensor))
    for key in keys:
        _fill_(state[key], 0.0, when)
    return keys


def rewind_(state: Any, to: int = 0, *, when: Flag = True) -> None:  # noqa: ANN401 - a mapping that may be written
    """Set one parameter's step count, on which bias corrections rest, where it has one.

    Args:
        state: ``optimizer.state[parameter]``.
        to: the count.
        when: whether to; a 0-dim tensor where that is decided on the device.

    Example:
        >>> state = {"step": Tensor([7.0])}
        >>> rewind_(state)
        >>> state["step"]
        tensor([0.])
    """
    count = state.get("step")
    if isinstance(count, Tensor):
        _fill_(count, float(to), when)
    elif count is not None and bool(when):
        state["step"] = to


_MOST_OPEN = 4096
"""Skips reach the host after fewer steps than that."""


@final
class Resets:
    """When moments are cleared, and clearing them; ``last`` is the update of the latest reset.

    In device mode a reset is masked on the device, and repeated if its step turns out skipped and
    no later reset did what it was to do. A plugin asks :meth:`is_due` in ``before_update`` and
    again in ``after_update``, and calls what it needs of the rest; ``last`` belongs in its state.

    Example:
        >>> resets = Resets(500, "my-plugin")
        >>> resets.interval, resets.last
        (500, 0)
    """

    __slots__ = ("_checked", "_known", "_open", "interval", "name")

    def __init__(self, interval: int, name: str) -> None:
        """Reset every so many updates, never if 0, on behalf of the plugin of this name."""
        self.interval = interval
        self.name = name
        self._known = 0
        self._open: deque[tuple[int, int]] = deque()
        self._checked = False

    @property
    def last(self) -> int:
        """The update of the latest reset, 0 before the first."""
        return self._open[-1][1] if self._open else self._known

    @last.setter
    def last(self, update: int) -> None:
        self._known = update
        self._open.clear()

    def is_due(self, step: Step) -> bool:
        """Tell whether this step's update is one that resets; updates count from 1."""
        if not self.interval:
            return False
        return (step.updates + 1) // self.interval > self.last // self.interval

    def rewind(self, step: Step) -> None:
        """Let bias corrections start anew."""
        for state in step.states:
            rewind_(state, when=_acts(step))

    def clear(self, step: Step) -> None:
        """Clear the moments."""
        for state in step.states:
            clear_(state, when=_acts(step))
        self._open.append((step.number, step.updates + 1))
        if step.session.host or len(self._open) > _MOST_OPEN:
            self._known = self._open.popleft()[1]
        step.emit("reset", "moments were set to zero", when=_acts(step), moments=_keys(step.states))

    def missed(self, step: Step) -> None:
        """Take back the reset of a step that turned out to be skipped."""
        self._open = deque(one for one in self._open if one[0] != step.number)

    def check(self, step: Step) -> None:
        """Make sure, once an update was made, that there is something to reset.

        Raises:
            AttachError: The optimizer keeps no moments.
        """
        if self._checked or not self.interval:
            return
        self._checked = True
        if all(first(s) is None and second(s) is None for s in step.states):
            kinds = ", ".join(type(one).__name__ for one in step.session.optimizers)
            raise AttachError(
                f"{self.name} resets moments every {self.interval} updates, but {kinds} keeps none"
                " that stablekit knows; set it to 0 if it may be, or use an optimizer with momentum"
            )


def _acts(step: Step) -> Flag:
    """Return where the step is applied; in host mode hooks after a skip do not fire at all."""
    return True if step.session.host else step.ok


def _keys(states: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {key for state in states for key in (*FIRST, *SECOND) if key in state}
    return sorted(found)


def _fill_(tensor: Tensor, value: float, when: Flag) -> None:
    part = local(tensor)
    if isinstance(when, Tensor):
        part.masked_fill_(when.to(part.device), value)
    elif when:
        part.fill_(value)


def _find(state: Mapping[str, Any], keys: tuple[str, ...]) -> Tensor | None:
    found = (local(state[key]) for key in keys if isinstance(state.get(key), Tensor))
    return next(found, None)
