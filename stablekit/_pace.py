"""Which optimizer steps when: one optimizer is a step of its own, several make one round."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from stablekit import _nonfinite
from stablekit._agreement import agree
from stablekit._amp import AmpState, refuse_lonely, refuse_scaled, scaler_above
from stablekit._engines import refuse_inside_engine
from stablekit._round import Round
from stablekit._sharding import world_size
from stablekit.errors import IncompleteRoundError

if TYPE_CHECKING:
    from types import FrameType

    from torch.optim import Optimizer

    from stablekit._session import Session


@final
class Pace:
    """Opens a round at the first optimizer's step and closes it after the last one's."""

    def __init__(self, session: Session) -> None:
        """Wait for the first step."""
        self.session = session
        self._round: Round | None = None
        self._begun: list[Optimizer] = []
        self._finished = 0
        self._has_met = False
        self._seen: list[tuple[Tensor | None, int]] = []

    @property
    def is_paused(self) -> bool:
        """Whether the session lets steps pass unseen."""
        return self.session.is_paused

    def begin(
        self, optimizer: Optimizer, *, frame: FrameType | None = None, by_hand: bool = False
    ) -> Round:
        """Return the round this optimizer's step belongs to, opening it if it is the first.

        Args:
            optimizer: the one whose step begins.
            frame: the call of its step.
            by_hand: whether factors must be written rather than handed to a fused kernel.

        Raises:
            IncompleteRoundError: Another optimizer of the session was not stepped in between, or
                gradients changed after the decision about them.
            AttachError: Gradients of one of several optimizers are still times the loss scale.
        """
        moment = self._current(optimizer)
        if moment is None:
            moment = self._open(optimizer, frame, by_hand=by_hand)
        else:
            refuse_scaled(optimizer)
        self._round = moment
        self._begun.append(optimizer)
        return moment

    def again(self) -> Round | None:
        """Treat another evaluation of the closure of the optimizer that is stepping."""
        if self._round is not None:
            self.session.hearing.take()  # a step has the loss of its first evaluation
            self._round.reevaluate()
            self._note(self._round)
        return self._round

    def saw_loss(self, loss: Tensor) -> None:
        """Take the value a closure returned as the loss, unless one was observed explicitly."""
        self.session.hearing.overhear(loss, instead=True)

    def finish(self, optimizer: Optimizer) -> None:
        """Note that an optimizer has stepped; close the round after the last."""
        if self._round is None or not any(optimizer is one for one in self._begun):
            return
        self._finished += 1
        if self._finished == len(self.session.optimizers):
            moment = self._round
            self._drop()
            self.session.close(moment)

    def _open(self, optimizer: Optimizer, frame: FrameType | None, *, by_hand: bool) -> Round:
        session = self.session
        if not self._has_met:
            self._meet(frame)
        is_scaled = world_size() > 1 and getattr(optimizer, "found_inf", None) is not None
        scaler = scaler_above(frame) if is_scaled or len(session.optimizers) > 1 else None
        amp = AmpState(session.optimizers, optimizer, scaler)
        session.count_step()
        moment = Round(session, amp)
        moment.observe()
        if not moment.skipped:
            moment.transform()
            moment.write(by_hand=by_hand)
            moment.before_update()
        self._note(moment)
        return moment

    def _meet(self, frame: FrameType | None) -> None:
        """Before the first step: make sure that all ranks will go through the steps together."""
        session = self.session
        layout, _ = session.current_layout()
        refuse_inside_engine(frame)
        if world_size() > 1:
            has_groups, is_cut = bool(session.reduce_groups), bool(layout.spans)
            scaler = scaler_above(frame)
            for one in session.optimizers:
                refuse_lonely(scaler, one, has_groups=has_groups, is_cut=is_cut)
        session.expects_loss = agree(session, layout)
        self._has_met = True

    def _note(self, moment: Round) -> None:
        if len(self.session.optimizers) > 1:
            grads = [param.grad for param in moment.params]
            self._seen = [(g, 0 if g is None else g._version) for g in grads]

    def _current(self, optimizer: Optimizer) -> Round | None:
        """Return the round that is open for this optimizer, after settling one that is not."""
        moment = self._round
        if moment is None:
            return None
        if self._finished < len(self._begun):  # the last step raised
            self._drop()
        elif any(optimizer is one for one in self._begun) or self._is_stale(moment, optimizer):
            self._drop_incomplete(moment, optimizer)
        return self._round

    def _is_stale(self, moment: Round, optimizer: Optimizer) -> bool:
        """Tell whether gradients are others than those the decision was about."""
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        return any(
            param.grad is not grad or (grad is not None and grad._version != version)
            for param, (grad, version) in zip(moment.params, self._seen, strict=True)
            if id(param) in own
        )

    def _drop(self) -> None:
        self._round, self._begun, self._finished, self._seen = None, [], 0, []

    def _drop_incomplete(self, moment: Round, optimizer: Optimizer) -> None:
        """Close a round whose missing optimizers a GradScaler held back; refuse any other."""
        everyone = self.session.optimizers
        missing = [i for i, o in enumerate(everyone) if not any(o is s for s in self._begun)]
        self._drop()
        if _nonfinite.is_in_any(moment, [everyone[i] for i in missing]):
            self.session.close(moment)
            return
        names = ", ".join(f"number {i} ({type(everyone[i]).__name__})" for i in missing)
        raise IncompleteRoundError(
            f"{type(optimizer).__name__} steps with new gradients, but {names} of the same session"
            " has not stepped since the last decision; step all optimizers of a session each time,"
            " call what changes gradients (scaler.unscale_, clipping, zero_grad) before the first"
            " of their steps, or attach a session to each"
        )
