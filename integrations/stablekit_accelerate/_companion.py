"""The plugin that comes after the listed ones and acts for the accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from stablekit import hookimpl
from stablekit_accelerate._checkpoint import Checkpoints
from stablekit_accelerate._clipping import LoopClipping
from stablekit_accelerate._report import Report
from stablekit_accelerate._skips import SkipFlags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from stablekit import Event, Session, Step
    from stablekit_accelerate._desk import Desk


@final
class Companion:
    """Clips where the loop asked for it, logs, and tells the accelerator of skipped steps."""

    name = "accelerate"

    def __init__(self, accelerator: Accelerator, *, log_metrics: bool, report_skips: bool) -> None:
        """Take part when :meth:`join` was called."""
        self.accelerator = accelerator
        self.takes_losses = False
        self._report = Report(accelerator) if log_metrics else None
        self._skips = SkipFlags(accelerator) if report_skips else None

    def join(self, session: Session, desk: Desk, *, observe_loss: bool, loop_clips: bool) -> None:
        """Begin, with the session this plugin is in."""
        self.session = session
        self.takes_losses = observe_loss
        self.clipping = LoopClipping(self.accelerator, session, clips=loop_clips)
        self._desk = desk
        desk.join(self)
        self._checkpoints = Checkpoints(self.accelerator, session, desk.index(self))

    def saw_loss(self, loss: Tensor) -> None:
        """Tell the session a loss that backward begins at."""
        if self._skips is not None:
            self._skips.clear(self.session)
        if self.takes_losses and loss.numel() == 1:
            self.session.observe(loss=loss)

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clip to what the loop named."""
        self.clipping.apply(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Tell the accelerator whether the step was skipped."""
        self.clipping.clear()
        if self._skips is not None:
            self._skips.tell(step)

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Put it into the log."""
        if self._report is not None:
            self._report.event(event)

    @hookimpl
    def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Give them to the trackers."""
        if self._report is not None:
            self._report.metrics(number, metrics)

    @hookimpl
    def on_detach(self, session: Any) -> None:  # noqa: ANN401 - as the hook's
        """Leave the accelerator as it was."""
        self._desk.leave(self)
        self._checkpoints.remove()
        if self._skips is not None:
            self._skips.clear(session)
