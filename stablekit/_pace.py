"""Which optimizer steps when: one optimizer is a step of its own, several make one round."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from stablekit._amp import AmpState
from stablekit._round import Round
from stablekit.errors import IncompleteRoundError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from stablekit._session import Session


@final
class Pace:
    """Opens a round at the first optimizer's step and closes it after the last one's."""

    def __init__(self, session: Session) -> None:
        """Wait for the first step."""
        self.session = session
        self._round: Round | None = None
        self._stepped: list[Optimizer] = []

    @property
    def is_paused(self) -> bool:
        """Whether the session lets steps pass unseen."""
        return self.session.is_paused

    def begin(self, optimizer: Optimizer, *, by_hand: bool = False) -> Round:
        """Return the round this optimizer's step belongs to, opening it if it is the first.

        Args:
            optimizer: the one whose step begins.
            by_hand: whether factors must be written rather than handed to a fused kernel.

        Raises:
            IncompleteRoundError: Another optimizer of the session was not stepped in between.
        """
        if any(optimizer is other for other in self._stepped):
            self._refuse(optimizer)
        if self._round is None or not self._stepped:
            self._round = self._open(by_hand=by_hand)
        return self._round

    def again(self) -> None:
        """Treat another evaluation of the closure of the optimizer that is stepping."""
        if self._round is not None:
            self._round.reevaluate()

    def saw_loss(self, loss: Tensor) -> None:
        """Take the value a closure returned as the loss, unless one was observed explicitly."""
        self.session.saw_loss(loss)

    def finish(self, optimizer: Optimizer) -> None:
        """Note that an optimizer has stepped; close the round after the last."""
        if self._round is None:
            return
        self._stepped.append(optimizer)
        if len(self._stepped) == len(self.session.optimizers):
            moment, self._round, self._stepped = self._round, None, []
            self.session.close(moment)

    def _open(self, *, by_hand: bool) -> Round:
        session = self.session
        session.number += 1
        moment = Round(session, AmpState(session.optimizers))
        moment.observe()
        if not moment.skipped:
            moment.transform()
            moment.write(by_hand=by_hand)
            moment.before_update()
        return moment

    def _refuse(self, optimizer: Optimizer) -> None:
        everyone = self.session.optimizers
        missing = [i for i, o in enumerate(everyone) if not any(o is s for s in self._stepped)]
        self._round, self._stepped = None, []
        names = ", ".join(f"number {i} ({type(everyone[i]).__name__})" for i in missing)
        raise IncompleteRoundError(
            f"{type(optimizer).__name__} was stepped twice, but {names} of the same session was not"
            " stepped in between; step all optimizers of a session each time, or attach a session"
            " to each"
        )
