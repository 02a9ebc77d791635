"""Answering trouble step by step: skip, go slower, go back, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, final

from stablekit import hookimpl
from stablekit.arguments import plugin_name, whole
from stablekit.errors import AttachError
from stablekit_recovery.lr_backoff import LRBackoff
from stablekit_recovery.rollback import Rollback
from stablekit_recovery.skip_spikes import SkipSpikes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Event, Session, Step

    PartT = TypeVar("PartT", SkipSpikes, LRBackoff, Rollback)

__all__ = ["Escalation"]

_PARTS = ("skip", "backoff", "rollback")


@final
class Escalation:
    """Skip spikes; if they persist lower the learning rate, then go back, and at last stop.

    1. :class:`SkipSpikes` skips what stands out or is not finite, at most ``max_consecutive`` steps
       in a row.
    2. When it gives in, the step is taken at a learning rate lowered by :class:`LRBackoff`.
    3. When that has happened ``backoffs`` times before the rate has recovered, and whenever
       :class:`Rollback` finds by its own rules that the run diverges, the run returns to a
       snapshot, and goes on from there with other data and a rate lowered once more. The windows of
       SkipSpikes go back with it.
    4. When returning does not get it past the trouble, it stops with a ``DivergenceError``.

    The parts are used through this plugin and act, record and emit under its name; do not attach
    them a second time. Give them to set more than the arguments here, which are those of the parts.

    Args:
        skip: the first part; None makes one from ``sigma``, ``window`` and ``max_consecutive``.
        backoff: the second; None makes one from ``factor`` and ``recovery``.
        rollback: the third; None makes one from ``every``, ``patience`` and ``max_rollbacks``.
        backoffs: how often the rate is lowered before the run goes back, at least 1.
        sigma: as in :class:`SkipSpikes`, likewise ``window`` and ``max_consecutive``.
        window: see there.
        max_consecutive: see there.
        factor: as in :class:`LRBackoff`, likewise ``recovery``.
        recovery: see there.
        every: as in :class:`Rollback`, likewise ``patience`` and ``max_rollbacks``.
        patience: see there.
        max_rollbacks: see there.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or is given next to the part it belongs to.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> session = stablekit.attach(optimizer, Escalation(max_consecutive=2))
        >>> for g in [1.0] * 40 + [float("nan")] * 10 + [1.0]:
        ...     p.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> [event.kind for event in session.events if event.plugin][-2:]
        ['rollback', 'lr-backoff']
        >>> p.data  # of 40 updates the first snapshot holds one; then half a step
        tensor([-1.5000])
    """

    needs = ("parameters",)
    cost = "a copy to CPU memory every so many updates; the loss of all ranks"

    def __init__(
        self,
        *,
        skip: SkipSpikes | None = None,
        backoff: LRBackoff | None = None,
        rollback: Rollback | None = None,
        backoffs: int = 2,
        sigma: float | None = None,
        window: int | None = None,
        max_consecutive: int | None = None,
        factor: float | None = None,
        recovery: int | None = None,
        every: int | None = None,
        patience: int | None = None,
        max_rollbacks: int | None = None,
        name: str | None = None,
    ) -> None:
        """Make the parts that are not given."""
        self.backoffs = whole("backoffs", backoffs, at_least=1)
        self.name = plugin_name(name, "escalation")
        first = {"sigma": sigma, "window": window, "max_consecutive": max_consecutive}
        third = {"every": every, "patience": patience, "max_rollbacks": max_rollbacks}
        self.skip = _part("skip", SkipSpikes, skip, first)
        self.backoff = _part(
            "backoff", LRBackoff, backoff, {"factor": factor, "recovery": recovery}
        )
        self.rollback = _part("rollback", Rollback, rollback, third)
        for part in (self.skip, self.backoff, self.rollback):
            part.name = self.name
        self._tries = 0
        self._tried_at = 0

    @classmethod
    def example(cls) -> Escalation:
        """Return one that takes snapshots all the time, as short checks need it."""
        return cls(rollback=Rollback.example())

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Lower the rates as far as they are lowered.

        Raises:
            AttachError: A part is attached a second time.
        """
        self._refuse_doubles(session)
        self.backoff.on_attach(session)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Skip a spike."""
        self.backoff.observe_gradients(step)
        self.skip.observe_gradients(step)

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Go up one rung when skipping has not helped."""
        self.rollback.on_event(event, step)
        if event.plugin == self.name and event.kind == "rollback":
            self._tries = 0
            self.backoff.back_off(step)
        elif event.plugin == self.name and event.kind == "level-shift":
            self._escalate(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Let every part finish the step."""
        self.skip.on_step_end(step)
        self.backoff.on_step_end(step)
        if self.backoff.current == 1:
            self._tries = 0
        self.rollback.on_step_end(step)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Let go of the session and the memory."""
        self.backoff.on_detach(session)
        self.rollback.on_detach(session)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts."""
        saved = {part: getattr(self, part).state_dict() for part in _PARTS}
        flat = {f"{part}.{key}": value for part in saved for key, value in saved[part].items()}
        return {**flat, "tries": self._tries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A field is out of range.
        """
        self._tries = whole("tries", state["tries"])
        for part in _PARTS:
            getattr(self, part).load_state_dict(_fields(part, state))

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Continue with the windows of a snapshot; what was done since then stays in mind."""
        self.skip.go_back(_fields("skip", state))

    def _refuse_doubles(self, session: Session) -> None:
        kinds = {SkipSpikes: "skip", LRBackoff: "backoff", Rollback: "rollback"}
        for name, plugin in session.plugins.items():
            part = kinds.get(type(plugin))
            if part is not None:
                kind = type(plugin).__name__
                raise AttachError(
                    f"{name!r} would act a second time: {self.name} has a {kind} of its own. Leave"
                    f" it out, or pass yours to Escalation, as in Escalation({part}={kind}(...))"
                )

    def _escalate(self, step: Step) -> None:
        if step.number == self._tried_at:  # both signals stand out
            return
        self._tried_at = step.number
        self._tries += 1
        if self._tries > self.backoffs:
            self.rollback.request(f"the learning rate was lowered {self.backoffs} times in vain")
        else:
            self.backoff.back_off(step)


def _part(name: str, kind: type[PartT], given: PartT | None, arguments: Mapping[str, Any]) -> PartT:
    """Return the part that was given, or make it from the arguments that were."""
    own = {key: value for key, value in arguments.items() if value is not None}
    if given is None:
        return kind(**own)
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {given!r}")
    if own:
        raise ValueError(f"{', '.join(own)} and {name} cannot both be given; set it in {name}")
    return given


def _fields(part: str, state: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}
