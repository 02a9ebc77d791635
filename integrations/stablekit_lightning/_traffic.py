"""What goes back and forth in every step: losses to the sessions, metrics and events to logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import stablekit
from stablekit_lightning._events import EventLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from stablekit import Session


@final
class Traffic:
    """The losses that wait for a step, and the step that was logged last."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Start where the sessions are."""
        self.sessions = sessions
        self._losses: list[Tensor] = []
        self._logged = self._steps()
        self._events = [EventLog(session) for session in sessions]

    def note(self, loss: Tensor, trainer: Trainer) -> None:
        """Keep the loss of a micro-batch, without what Lightning multiplied it by."""
        loss = loss.detach() * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(loss.new_ones(()))  # get_scale() would read the device
        self._losses.append(loss)

    def hand_over(self, optimizer: Optimizer) -> None:
        """Tell the session of the optimizer that is about to step."""
        session = stablekit.session(optimizer)
        for loss in self._losses:
            session.observe(loss=loss)
        self._losses = []

    def report(self, trainer: Trainer, module: LightningModule) -> None:
        """Log new events, and metrics if a step since the last time was one to log.

        ``step_loss`` is the mean over the micro-batches and ranks of a step; ``loss`` is a name
        that modules log themselves.
        """
        if trainer.is_global_zero:
            for log in self._events:
                log.tell()
        every, steps = self.sessions[0].log_every, self._steps()
        if not every or steps // every == self._logged // every:
            return
        self._logged = steps
        for i, session in enumerate(self.sessions):
            prefix = f"optimizer-{i}/" if len(self.sessions) > 1 else ""
            metrics = session.metrics().items()
            named = {"step_loss" if name == "loss" else name: value for name, value in metrics}
            values = {prefix + name: value for name, value in named.items()}
            module.log_dict(values, on_step=True, on_epoch=False)

    def _steps(self) -> int:
        return sum(session.number for session in self.sessions)
