"""One step of a session, from the gradients as backward left them to the metrics."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import _loss, _nonfinite
from stablekit._amp import AmpState
from stablekit._commit import commit
from stablekit._ledger import Ledger
from stablekit._memory import Memory
from stablekit.events import Event
from stablekit.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from stablekit._session import Session

_OVERFLOW = "the GradScaler found an overflow"


@final
class Round:
    """What happens between the first pre-hook and the last post-hook of one step."""

    def __init__(self, session: Session, amp: AmpState) -> None:
        """Take the parameters as they are now and number the step."""
        self.session = session
        self.optimizers: Sequence[Optimizer] = session.optimizers
        self.layout, self.params = session.current_layout()
        self.number = session.number
        self.updates = session.updates
        self.amp = amp
        self.evaluation = 0
        self.phase = ""
        self.skipped = False
        self.ledger: Ledger | None = None
        self.ok = amp.ok(self.layout.true)
        self.lent_scale = amp.scale
        self.lent_found_inf: Tensor | None = None
        session.latest.begin()
        self._losses = session.hearing.take()
        self._loss: Tensor | None = None
        self._has_agreed_loss = False
        self._requests: list[tuple[str, str, Tensor, Tensor | None]] = []

    def learning(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Tell whether statistics may move: not when skipped, reevaluated, or without gradients."""
        if self.evaluation == 0 and self._has_gradients(chosen):
            return self.ok
        return torch.zeros_like(self.ok)

    @property
    def is_withheld(self) -> bool:
        """Whether the optimizers must not act."""
        return self.skipped and not self.session.dry_run

    def read(self) -> Ledger:
        """Open the books: one sweep over the gradients, one reduction where they are sharded."""
        seats, ride = self.session.seats, self._rider()
        unscale = self.amp.unscale(self.layout.device)
        memory = Memory(self.params, self.layout, unscale=unscale, ride=ride)
        self.ledger = Ledger(
            memory,
            host=self.session.host,
            dry_run=self.session.dry_run,
            reduce_groups=self.session.reduce_groups,
            units=seats.needing("unit_norms", self.layout),
            weights=seats.needing("weight_unit_norms", self.layout),
        )
        if ride is not None and self.evaluation == 0:
            self._agree_on(memory.ride)
        return self.ledger

    def observe(self) -> None:
        """Let plugins look and decide together whether the step is skipped."""
        ledger = self.read()
        if self.amp.overflowed(host=self.session.host):
            self.emit("scaler-skip", "", _OVERFLOW, True, (), {})
            self._settle_skip()
            return
        _nonfinite.watch(self, ledger)
        self._fire("observe_gradients")
        for plugin, reason, flag, culprits in self._requests:
            self.emit("skip", plugin, reason, flag, culprits if culprits is not None else (), {})
        if self.session.host:
            if self._requests:
                self._settle_skip()
        elif self._requests or self.amp.found_inf is not None:
            if self.amp.found_inf is not None:
                self.emit("scaler-skip", "", _OVERFLOW, ~self.amp.ok(self.layout.true), (), {})
            self._settle_on_device()

    def transform(self) -> None:
        """Let plugins change the gradients; nothing is written yet."""
        self._fire("transform_gradients")

    def write(self, *, by_hand: bool) -> None:
        """Write what is pending, or leave one global factor to a fused optimizer's kernel.

        Args:
            by_hand: write even what a fused optimizer could multiply on the way.
        """
        ledger = self.ledger
        assert ledger is not None
        if self.session.dry_run:
            return
        pending = ledger.factor
        must_write = by_hand or ledger.unit_factors or self.session.seats.has("before_update")
        if must_write or not self._can_ride(pending):
            commit(ledger)
        elif pending is not None and not (self.session.host and pending == 1):
            scale = self.amp.scale if ledger.memory.unscale is not None else None
            self.lent_scale = pending.reciprocal() if scale is None else scale / pending
            return
        self.lent_scale = None if ledger.memory.unscale is None else self.amp.scale

    def _can_ride(self, pending: Tensor | None) -> bool:
        if pending is None:
            return True
        by_kernel = self.amp.fused and pending.ndim == 0
        return by_kernel and not (self.session.host and bool(pending == 0))

    def before_update(self) -> None:
        """Let plugins see what the optimizer will."""
        if not self.session.dry_run:
            self._fire("before_update")

    def reevaluate(self) -> None:
        """Treat a later evaluation of the same closure with the thresholds of the first."""
        if self.skipped:
            return
        self.evaluation += 1
        ledger = self.read()
        _nonfinite.refuse(self, ledger)
        self.transform()
        self.write(by_hand=True)

    def end(self) -> None:
        """Close the step: projections, metrics, and let the gradients go."""
        ledger = self.ledger
        assert ledger is not None
        if self.amp.fused and self.lent_scale is not None and not self.skipped:
            ledger.kernel_wrote()
        if not self.skipped and not self.session.dry_run:
            self._fire("after_update")
        self._record_norms(ledger)
        self._fire("on_step_end")
        self.ledger = None
        self._losses = []
        self._requests = []

    def loss(self) -> Tensor | None:
        """Return the mean of the observed losses over data-parallel ranks."""
        if not self._has_agreed_loss:
            self._has_agreed_loss = True
            if self._expects_loss:
                home, host = self.layout.device, self.session.host
                self._loss = _loss.reduced(self._losses, home, host=host)
        return self._loss

    def record(self, plugin: str, name: str, value: Tensor | float) -> None:
        """Keep a plugin's metric, and count the steps in which it clipped."""
        metrics = self.session.latest
        metrics.record(f"{plugin}/{name}", value)
        if name == "clipped" and self.evaluation == 0:
            acted = value > 0
            metrics.count_clipped(plugin, bool(acted) if self.session.host else acted & self.ok)

    def ask_to_skip(
        self, plugin: str, reason: str, when: bool | Tensor, culprits: Tensor | None
    ) -> None:
        """Note a plugin's wish; on a device its truth is only known there."""
        if self.session.host:
            if bool(when) and bool(self.ok):
                self._requests.append((plugin, reason, self.ok, culprits))
        else:
            self._requests.append((plugin, reason, self.ok & when, culprits))

    def emit(
        self,
        kind: str,
        plugin: str,
        message: str,
        when: bool | Tensor,
        tensors: Tensor | Sequence[str],
        data: dict[str, Any],
    ) -> None:
        """Emit an event, now or when its values have reached the host."""
        if (self.session.host or isinstance(when, bool)) and not when:
            return
        late = {key: value for key, value in data.items() if isinstance(value, Tensor)}
        flags = [when] if isinstance(when, Tensor) else []
        masks = [tensors] if isinstance(tensors, Tensor) else []
        names = () if isinstance(tensors, Tensor) else tuple(tensors)
        event = Event(kind, self.number, plugin, message, names, dict(data))
        are_positions = bool(masks) and masks[0].dtype != torch.bool
        deliver = partial(
            self._deliver, event, list(late), len(flags), len(masks), are_positions=are_positions
        )
        if late or flags or masks:
            self.session.mail.send(deliver, *flags, *masks, *late.values())
        else:
            deliver()

    def _deliver(
        self,
        event: Event,
        keys: list[str],
        flags: int,
        masks: int,
        *values: Any,  # noqa: ANN401 - host values of any shape
        are_positions: bool,
    ) -> None:
        if flags and not values[0]:
            return
        names = event.tensors
        if masks:
            names = self._named(values[flags], are_positions=are_positions)
        data = {**event.data, **dict(zip(keys, values[flags + masks :], strict=True))}
        self.session.publish(
            Event(event.kind, event.step, event.plugin, event.message, names, data), Step(self)
        )

    def _named(self, marks: list[float], *, are_positions: bool) -> tuple[str, ...]:
        """Return names by a mask over all parameters, or by positions in their own order."""
        names = self.layout.names
        if are_positions:
            return tuple(names[int(place)] for place in marks if place >= 0)
        return tuple(name for name, hit in zip(names, marks, strict=True) if hit)

    def _has_gradients(self, chosen: Sequence[int] | None) -> bool:
        if self.ledger is None or self.ledger.is_shared:
            return True
        held = self.ledger.memory.held
        return bool(held) if chosen is None else not set(held).isdisjoint(chosen)

    @property
    def _expects_loss(self) -> bool:
        return bool(self._losses) or self.session.expects_loss

    def _rider(self) -> Tensor | None:
        """Return what is agreed on with the norms: overflow, what is not finite, the loss."""
        if not (self.layout.spans or self.session.reduce_groups):
            return None
        home = self.layout.device
        if not self._losses and self.amp.found_inf is None:
            return self.layout.quiet
        nothing_bad = torch.zeros(1, device=home)
        return torch.cat([self.amp.flag(home), nothing_bad, _loss.rider(self._losses, home)])

    def _agree_on(self, ride: Tensor) -> None:
        if self.amp.found_inf is not None:
            self.amp.agree(ride[0], tell=not self.session.dry_run)
            self.ok = self.amp.ok(self.layout.true)
        if self.layout.world_span is not None:
            self._has_agreed_loss = True
            if self.session.host or self._expects_loss:
                self._loss = _loss.shared(ride[2:], host=self.session.host)

    def _settle_skip(self) -> None:
        self.skipped = True
        self.ok = torch.zeros_like(self.ok)
        self.session.count_skip()
        self._fire("on_skip")

    def _settle_on_device(self) -> None:
        for _, _, flag, _ in self._requests:
            self.ok = self.ok & ~flag
        if not self.amp.fused:
            if not bool(self.ok):
                self._settle_skip()
        else:
            if not self.session.dry_run:
                self.lent_found_inf = (~self.ok).float()
            self.session.mail.send(self._learn_of_skip, self.ok)

    def _learn_of_skip(self, ok: float) -> None:
        if ok:
            return
        self.session.count_skip()
        self.session.updates -= 1
        self._fire("on_skip")

    def _record_norms(self, ledger: Ledger) -> None:
        latest = self.session.latest
        if self.skipped:
            latest.nothing_clipped()
        latest.record("grad_norm", ledger.raw_norm())
        every = self.session.log_every
        may_read = every > 0 and self.number % every == 0 and not ledger.is_shared
        if ledger.knows_norm or may_read:
            norm = ledger.norm()
            is_whole = self.session.host and not self.skipped
            latest.record(
                "grad_norm_clipped", norm if is_whole else torch.where(self.ok, norm, 0.0)
            )
        else:
            latest.forget("grad_norm_clipped")
        if self._loss is not None or (self._losses and not _loss.is_shared()):
            loss = self.loss()
            assert loss is not None
            latest.record("loss", loss)
        latest.record("steps_skipped", self.session.skipped)

    def _fire(self, hook: str) -> None:
        self.phase = hook
        try:
            self.session.seats.call(hook, self)
        finally:
            self.phase = ""
