"""Lowering the learning rate after trouble, and letting it come back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, final

from stablekit import hookimpl
from stablekit.arguments import fraction, plugin_name, whole
from stablekit.errors import NoEffectWarning
from stablekit_recovery._words import words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stablekit import Event, Session, Step

__all__ = ["LRBackoff", "recovered"]


def recovered(low: float, updates: int, recovery: int) -> float:
    """Return the factor so many updates after it was lowered: back to 1 in a straight line.

    ``low + (1 - low) * min(1, updates / recovery)``

    Example:
        >>> recovered(0.5, 0, 100), recovered(0.5, 50, 100), recovered(0.5, 200, 100)
        (0.5, 0.75, 1.0)
    """
    if updates >= recovery:
        return 1.0
    return low + (1.0 - low) * max(updates, 0) / recovery


@final
class LRBackoff:
    """Lower all learning rates by a factor after trouble; they recover over the next updates.

    Trouble is an event of one of the kinds ``on``, from the session or any plugin. The factor comes
    on top of the schedule and only while optimizers step: neither a scheduler nor a checkpoint of
    the optimizer sees it, and what a scheduler reports as the last rate is without it. Trouble
    again lowers the rates again, but not below ``floor``, and not within ``cooldown`` steps, in
    which it only makes recovery start over.

    On the host the rates are lower in the very step that was in trouble, unless it was skipped. In
    device mode events arrive at most ``log_every`` steps late, and the rates fall that much later.

    Args:
        factor: what the rates are multiplied by, between 0 and 1.
        recovery: in how many updates they are back, at least 1.
        floor: the least the factor becomes, above 0 and at most ``factor``.
        cooldown: how many steps pass before the rates are lowered again.
        on: kinds of events; also as "spike+skip".
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> plugin = LRBackoff(0.5, recovery=2)
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> session = stablekit.attach(optimizer, "nonfinite-guard", plugin)
        >>> for g in (1.0, float("nan"), 1.0, 1.0, 1.0):
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> p.data  # steps of 1, none, 0.5, 0.75 and 1
        tensor([-3.2500])
        >>> optimizer.param_groups[0]["lr"]
        1.0
    """

    cost = "nothing but a few numbers on the host"

    def __init__(
        self,
        factor: float = 0.5,
        *,
        recovery: int = 100,
        floor: float = 0.05,
        cooldown: int = 10,
        on: str | Iterable[str] = ("spike", "skip", "rollback"),
        name: str | None = None,
    ) -> None:
        """Check the arguments and start with unchanged rates."""
        self.factor = fraction("factor", factor)
        self.recovery = whole("recovery", recovery, at_least=1)
        self.floor = fraction("floor", floor)
        if self.floor > self.factor:
            raise ValueError(f"floor must be at most factor ({factor!r}), got {floor!r}")
        self.cooldown = whole("cooldown", cooldown)
        self.on = words("on", on)
        self.name = plugin_name(name, "lr-backoff")
        self._session: Session | None = None
        self._low = 1.0
        self._since = 0
        self._last = -1
        self._total = 0

    @property
    def current(self) -> float:
        """What learning rates are multiplied by now."""
        updates = self._since if self._session is None else self._session.updates
        return recovered(self._low, updates - self._since, self.recovery)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Lower the rates as far as they are lowered."""
        self._session = session
        self._apply()
        groups = [group for one in session.optimizers for group in one.param_groups]
        if not any("lr" in group for group in groups):
            warnings.warn(
                f"{self.name} has nothing to lower: no parameter group has a learning rate",
                NoEffectWarning,
                stacklevel=2,
            )

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Apply what the host has learned since the last step, such as that it was skipped."""
        self._apply()

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Lower the rates if this kind of event is trouble."""
        if event.kind in self.on and event.plugin != self.name:
            self.back_off(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Report the factor of this step and recover by one update."""
        step.record("factor", step.session.lr_factors.get(self.name, 1.0))
        self._apply()

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Let go of the session."""
        self._session = None

    def back_off(self, step: Step) -> None:
        """Lower the rates, or make recovery start over if that was done a moment ago."""
        now = self.current
        self._since = min(step.updates, step.session.updates)  # fewer after a rollback
        if self._last >= 0 and step.number - self._last <= self.cooldown:
            self._low = now
        else:
            self._low, self._last = max(self.floor, now * self.factor), step.number
            self._total += 1
            step.emit("lr-backoff", _message(now, self._low, step.number), factor=self._low)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return how far the rates were lowered last, and when."""
        return {"low": self._low, "since": self._since, "last": self._last, "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is not a number.
            ValueError: A field is out of range.
        """
        low, since = fraction("low", state["low"], closed=True), whole("since", state["since"])
        last, total = whole("last", state["last"], at_least=-1), whole("total", state["total"])
        if low == 0:
            raise ValueError("low must be a number above 0, got 0")
        self._low, self._since, self._last, self._total = low, since, last, total
        self._apply()

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Stay as it is when the run goes back: the rates are lowered for what comes again."""

    def _apply(self) -> None:
        if self._session is not None:
            self._session.scale_lr(self.current, by=self.name)


def _message(before: float, now: float, number: int) -> str:
    return (
        f"learning rates are lowered from {before:.4g} to {now:.4g} times those of the schedule at"
        f" step {number}"
    )
