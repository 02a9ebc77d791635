"""Metrics, histograms of gradient norms and events in TensorBoard."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, final

import torch

from stablekit import hookimpl
from stablekit.arguments import plugin_name, whole
from stablekit_monitors._at_end import at_end_of
from stablekit_monitors._paths import path_of, with_temporary_folder
from stablekit_monitors._ranks import writes_here

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch.utils.tensorboard import SummaryWriter

    from stablekit import Event, Session, Step

__all__ = ["TensorBoard"]

_FLUSH_SECONDS = 10


@final
class TensorBoard:
    """Write metrics as scalars, gradient norms as histograms and events as text.

    Scalars come every ``log_every`` steps of the session, under their own names; the horizontal
    axis is ``Step.number``. A histogram, of the base-10 logarithms of the gradient norms of all
    tensors, comes every ``histogram_every`` steps; norms that are 0 or not finite are left out.
    A run that goes on from an earlier step hides what was written from there on.

    Of several processes only the first writes.

    Args:
        log_dir: the folder of the run.
        histogram_every: 0 for no histograms.
        name: the plugin's name in the session.

    Raises:
        ImportError: The package tensorboard is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: ``histogram_every`` is negative.

    Example:
        >>> import pathlib, tempfile, torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with stablekit.attach(optimizer, TensorBoard(folder)):
        ...         p.grad = torch.tensor([3.0, 4.0])
        ...         optimizer.step()
        ...     len(list(pathlib.Path(folder).glob("events.out.tfevents.*")))
        1
    """

    cost = "a few scalars every `log_every` steps"

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        histogram_every: int = 100,
        name: str | None = None,
    ) -> None:
        """Check the arguments; nothing is written before the first step."""
        self.log_dir = path_of("log_dir", log_dir)
        self.histogram_every = whole("histogram_every", histogram_every)
        self.name = plugin_name(name, "tensorboard")
        if find_spec("tensorboard") is None:
            raise ImportError(
                "TensorBoard needs the package tensorboard: pip install 'stablekit[tensorboard]'"
            )
        self._writer: SummaryWriter | None = None
        self._close: Any = None
        self._last = 0

    @classmethod
    def example(cls) -> TensorBoard:
        """Return one that writes into a temporary folder."""
        return with_temporary_folder(partial(cls, histogram_every=4))

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Write the event as text."""
        if writes_here():
            self._follow(step)
            tensors = "".join(f"\n- `{name}`" for name in event.tensors)
            text = f"**{event.kind}** {event.plugin}: {event.message}\n{tensors}"
            self._open().add_text("events", text, event.step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Send off the norms of a step whose turn it is."""
        if writes_here():
            self._follow(step)
            if self.histogram_every and step.number % self.histogram_every == 0:
                step.defer(partial(self._histogram, step.number), step.gradients.raw_norms())

    @hookimpl
    def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics as scalars."""
        if writes_here():
            for key, value in metrics.items():
                self._open().add_scalar(key, value, number)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Close the file."""
        self._finish()

    def _follow(self, step: Step) -> None:
        """Begin another file where the run goes on from an earlier step."""
        number = step.session.number
        if number < self._last:
            self._finish()
        self._last = number

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What earlier files of the folder hold from this step on is hidden.
            self._writer = SummaryWriter(
                str(self.log_dir), purge_step=self._last, flush_secs=_FLUSH_SECONDS
            )
            self._close = at_end_of(self, self._writer.close)
        return self._writer

    def _finish(self) -> None:
        if self._writer is not None:
            self._close()
            self._writer = None

    def _histogram(self, number: int, norms: list[float]) -> None:
        values = torch.tensor(norms)
        values = values[values.isfinite() & (values > 0)]
        if len(values):
            self._open().add_histogram("log10_grad_norms", values.log10(), number)
