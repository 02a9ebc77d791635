"""Going back to an earlier state of the run when it diverges, and on with other data.

As was done by hand for PaLM (Chowdhery et al., arXiv 2204.02311, 5.1): restart from a checkpoint
about 100 steps before the spike and skip the 200 to 500 batches around it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

from stablekit import Event, hookimpl
from stablekit.arguments import flag, number, plugin_name, whole
from stablekit.errors import DivergenceError
from stablekit.snapshots import is_finite
from stablekit_recovery._batches import Batches, told
from stablekit_recovery._health import Health
from stablekit_recovery._returns import Returns
from stablekit_recovery._ring import Ring
from stablekit_recovery._words import words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stablekit import Session, Step
    from stablekit.snapshots import Snapshot

__all__ = ["Rollback"]

_BROKEN = "the parameters or the optimizer's state are not finite"


@final
class Rollback:
    """Keep snapshots of the run in CPU memory, and return to one when the run diverges.

    A run diverges when ``patience`` steps in a row are bad (skipped, not finite, or with a loss
    above the best level so far, see ``sigma``), when ``max_skips`` in a row are skipped, or when
    parameters or optimizer state are not finite. Then everything in a
    :class:`~stablekit.snapshots.Snapshot` is as it was, in place and bit for bit: parameters,
    optimizer state, buffers of ``model=``, what plugins learned, ``session.updates``, and what
    ``session.track(scheduler=...)`` named. Not so random numbers and data: the same batches in the
    same order would diverge again, so the loop goes on with the next ones. The event "rollback" has
    in its ``data`` the steps and updates it went over (``from_step``, ``to_step``,
    ``from_update``, ``to_update``), ``batches``, what ``session.observe(batch=...)`` called theirs,
    ``reason`` and ``rollbacks``, how many there were.

    A snapshot is taken every ``every`` updates, if the last ``calm`` steps were good and all is
    finite; where there is none, as at the start and in a resumed run, after the first good step.
    The run returns to the newest that is at least ``calm`` steps older than the trouble; if
    that leads into trouble again, to the one before. If the loss is as high as before from the
    first step after a return, then it is the data that changed: the level is accepted (event
    "level-accepted"). The run may return ``max_rollbacks`` times without getting past the point of
    trouble; the next time it is put back too, but raises.

    Every rank keeps its own shards: ``keep * (parameters + buffers + optimizer state)`` bytes, with
    AdamW in float32 12 bytes a parameter and snapshot. Snapshots are not part of a checkpoint: a
    resumed run has none until its first good step. Decisions rest on numbers that are the same on
    all ranks; :meth:`request` has to be called on every rank. In device mode the host learns of
    losses every ``log_every`` steps (with 0 hardly ever), takes snapshots only then, and goes back
    that much later.

    Args:
        every: how many updates lie between snapshots.
        keep: how many snapshots are kept.
        calm: how many steps must be good before a snapshot, and lie between it and trouble.
        patience: how many bad steps in a row are a divergence.
        max_skips: how many skipped steps in a row are one.
        sigma: how many standard deviations over the lowest mean of ``window`` losses are bad.
        window: over how many good losses that mean is taken.
        cooldown: for how many steps after a rollback there is no other, unless something is not
            finite.
        max_rollbacks: how many times the run may return without getting past the trouble.
        on: kinds of events that make the run return at once; also as "kind+kind".
        on_rollback: called with the event, on every rank; the place to skip batches.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> session = stablekit.attach(optimizer, Rollback(2, calm=1))
        >>> for batch, g in enumerate((1.0, 1.0, 1.0, float("nan"), 1.0)):
        ...     p.grad = torch.tensor([g])
        ...     session.observe(batch=batch)
        ...     optimizer.step()
        >>> p.data, session.updates  # back to 3 updates, then one more
        (tensor([-4.]), 4)
        >>> session.events[-1].data["batches"]
        [3]
    """

    needs = ("parameters",)
    cost = "a copy to CPU memory every so many updates; the loss of all ranks"

    def __init__(
        self,
        every: int = 100,
        *,
        keep: int = 2,
        calm: int = 20,
        patience: int = 20,
        max_skips: int = 10,
        sigma: float = 6.0,
        window: int = 128,
        cooldown: int = 50,
        max_rollbacks: int = 3,
        on: str | Iterable[str] = (),
        on_rollback: Callable[[Event], object] | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start without snapshots."""
        self.every = whole("every", every, at_least=1)
        self.keep = whole("keep", keep, at_least=1)
        self.calm = whole("calm", calm, at_least=1)
        self.patience = whole("patience", patience, at_least=1)
        self.max_skips = whole("max_skips", max_skips, at_least=1)
        self.sigma = number("sigma", sigma, above=0)
        self.window = whole("window", window, at_least=2)
        self.cooldown = whole("cooldown", cooldown)
        self.max_rollbacks = whole("max_rollbacks", max_rollbacks)
        self.on = words("on", on)
        if on_rollback is not None and not callable(on_rollback):
            raise TypeError(f"on_rollback must be callable, got {on_rollback!r}")
        self.on_rollback = on_rollback
        self.name = plugin_name(name, "rollback")
        self._health = Health(
            sigma=self.sigma, window=self.window, patience=patience, max_skips=max_skips
        )
        self._returns = Returns(cooldown=self.cooldown, most=self.max_rollbacks)
        self._ring = Ring(self.keep)
        self._batches = Batches()
        self._judged = 0
        self._overflow_at = 0
        self._asked = ""
        self._is_doubtful = False
        self._was_good = True

    @classmethod
    def example(cls) -> Rollback:
        """Return one that takes snapshots all the time, as short checks need it."""
        return cls(1, keep=1, calm=1)

    @property
    def nbytes(self) -> int:
        """How much CPU memory the snapshots take on this rank, in bytes."""
        return self._ring.nbytes

    def request(self, reason: str) -> None:
        """Return to a snapshot at the end of the next step; call it on every rank."""
        self._asked = reason

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Take note of overflows, which are a GradScaler's own business, and of asked-for kinds."""
        if event.kind == "scaler-skip":
            self._overflow_at = event.step
            return
        is_asked = event.kind in self.on and event.plugin != self.name
        if is_asked and not self._returns.is_cooling(step.number):
            self._asked = f"event {event.kind!r} of step {event.step}"

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Have the step judged, as soon as its numbers are known, and settle what follows."""
        self._ring.drop_stale()
        self._batches.add(step.number, step.session.batch)
        loss = step.loss
        known = [] if loss is None else [loss]
        step.defer(partial(self._see, step.number), step.gradients.raw_norm(), step.ok, *known)
        step.session.when_idle(partial(self._settle, step))

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Let the memory go."""
        self._ring.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned of the loss, and what happened; not the snapshots."""
        pending = {"asked": self._asked, "is_doubtful": self._is_doubtful}
        counts = {**self._returns.state_dict(), "was_good": self._was_good}
        return {**self._health.state_dict(), **pending, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A field is out of range.
        """
        asked = state["asked"]
        if not isinstance(asked, str):
            raise TypeError(f"asked must be a string, got {asked!r}")
        flags = [flag(key, state[key]) for key in ("is_doubtful", "was_good")]
        self._health.load_state_dict(state)
        self._returns.load_state_dict(state)
        self._asked = asked
        self._is_doubtful, self._was_good = flags

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Stay as it is when the run goes back: this is what knows that it did."""

    def _see(self, step: int, norm: float, ok: bool, loss: float | None = None) -> None:
        self._judged = step
        if step != self._overflow_at:
            has_numbers = self._health.see(step, loss, norm, skipped=not ok)
            self._is_doubtful = self._is_doubtful or not has_numbers
            self._was_good = self._was_good or self._health.good > 0

    def _settle(self, step: Step) -> None:
        """Go back, take a snapshot, or neither; everyone is done with the step."""
        session = step.session
        is_due = self._is_due(session)
        reason = self._reason(step, is_due=is_due)
        if reason:
            self._respond(step, reason)
        elif is_due:
            self._ring.take(session)
            self._batches.forget_until(self._ring.oldest.number)
            self._returns.reached(session.updates)
        step.record("snapshots", len(self._ring))
        step.record("age", session.updates - self._ring.newest.updates if self._ring else 0)
        step.record("rollbacks", self._returns.total)

    def _is_due(self, session: Session) -> bool:
        health = self._health
        if session.dry_run or self._judged != session.number or not health.good:
            return False
        if not self._ring:
            return True
        is_calm = health.good >= self.calm or health.trouble_at == 0
        return is_calm and session.updates - self._ring.newest.updates >= self.every

    def _reason(self, step: Step, *, is_due: bool) -> str:
        """Return why to go back now, or nothing."""
        asked, self._asked = self._asked, ""
        is_cooling = self._returns.is_cooling(step.number)
        if (is_due or self._is_doubtful) and not is_finite(step.session):
            asked = _BROKEN
        self._is_doubtful = False
        if is_cooling and (not asked or step.session.dry_run):
            return ""
        return asked or self._health.verdict()

    def _respond(self, step: Step, reason: str) -> None:
        health = self._health
        is_level = not self._was_good and health.is_high_only and reason == health.verdict()
        if is_level:
            health.forget_level()
            self._was_good = True
            step.emit("level-accepted", "the loss is as high from where the run returned: accepted")
        elif step.session.dry_run:
            health.forget_streak()
            self._returns.count(step.number, step.session.updates)
            step.emit("rollback", f"would have returned: {reason}", reason=reason)
        else:
            self._return(step, reason)

    def _return(self, step: Step, reason: str) -> None:
        session = step.session
        if not self._ring:
            raise DivergenceError(
                f"training diverged at step {step.number} ({reason}) before there was a snapshot to"
                " return to: lower the learning rate, or resume from a checkpoint"
            )
        trouble = self._health.trouble_at if self._health.bad else step.number
        snapshot, updates = self._ring.choose(trouble - self.calm), session.updates
        self._returns.count(step.number, updates)
        self._health.forget_streak()
        self._was_good = False
        snapshot.restore()
        self._tell(step, snapshot, updates, reason)
        if self._returns.are_used_up:
            raise DivergenceError(
                f"training diverged again at step {step.number} ({reason}), after"
                f" {self.max_rollbacks} rollbacks that did not get it past update"
                f" {self._returns.diverged_at} (max_rollbacks). Parameters and optimizer are as"
                f" after step {snapshot.number}: lower the learning rate, or look at the data"
            )

    def _tell(self, step: Step, snapshot: Snapshot, updates: int, reason: str) -> None:
        batches = self._batches.since(snapshot.number)
        message = (
            f"back from step {step.number} to the state after step {snapshot.number} (update"
            f" {updates} to {snapshot.updates}{told(batches)}): {reason}"
        )
        data: dict[str, Any] = {
            "from_step": step.number,
            "to_step": snapshot.number,
            "from_update": updates,
            "to_update": snapshot.updates,
            "batches": batches,
            "reason": reason,
            "rollbacks": self._returns.total,
        }
        step.emit("rollback", message, **data)
        if self.on_rollback is not None:
            self.on_rollback(Event("rollback", step.number, self.name, message, (), data))
