"""Metrics for the trackers of an accelerator, events for the log of its main process."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from accelerate.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from stablekit import Event

_LINES = 20
_NAMED = 3


@final
class Report:
    """Writes what a session says, events until there were too many."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Begin with nothing said."""
        self.accelerator = accelerator
        self._logger = get_logger("stablekit_accelerate")
        self._lines = 0

    def metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step; ``loss`` is a name that loops use themselves."""
        named = {"step_loss" if key == "loss" else key: value for key, value in metrics.items()}
        self.accelerator.log(named, step=number)

    def event(self, event: Event) -> None:
        """Write one line."""
        self._lines += 1
        if self._lines <= _LINES:
            self._logger.warning(line(event))
        if self._lines == _LINES:
            self._logger.warning("further events are not logged; see session.events")


def line(event: Event) -> str:
    """Return an event as one line.

    Example:
        >>> from stablekit import Event
        >>> names = ("head.weight", "head.bias", "0.weight", "0.bias")
        >>> line(Event("skip", 3, "nonfinite-guard", "it is NaN", names, {}))
        'step 3: skip (nonfinite-guard): it is NaN in head.weight, head.bias, 0.weight and 1 more'
    """
    said = f"step {event.step}: {event.kind}"
    said += f" ({event.plugin})" if event.plugin else ""
    said += f": {event.message}" if event.message else ""
    if event.tensors and event.tensors[0] not in event.message:
        said += f" in {', '.join(event.tensors[:_NAMED])}"
        more = len(event.tensors) - _NAMED
        said += f" and {more} more" if more > 0 else ""
    return said
