"""Metrics and events to experiment trackers: any object with a method ``log``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit import hookimpl
from stablekit.arguments import flag, plugin_name
from stablekit_monitors._ranks import writes_here

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Event

__all__ = ["Tracker"]


@final
class Tracker:
    """Hand metrics to a tracker's ``log(metrics, step=...)`` and events to its ``alert``.

    A wandb run, the modules wandb and trackio, and an ``Accelerator`` have such a ``log``; nothing
    is imported. Events become ``alert(title=..., text=...)`` where the object has that method, as
    wandb and trackio do; wandb itself holds back alerts of one title that come within a minute.

    Of several processes only the first hands anything on; the others may give None. A tracker that
    refuses steps lower than the last (wandb does) keeps the first of what a run did twice.

    Args:
        run: an object with ``log``.
        alerts: whether events become alerts.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``run`` has no method ``log``, or ``alerts`` is not a bool.

    Example:
        >>> import torch, stablekit
        >>> class Printer:
        ...     def log(self, metrics, step):
        ...         print(step, metrics["grad_norm"])
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=0.1), Tracker(Printer()))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        1 5.0
    """

    cost = "what the tracker takes for a call, every `log_every` steps"

    def __init__(
        self,
        run: Any,  # noqa: ANN401 - any tracker
        *,
        alerts: bool = True,
        name: str | None = None,
    ) -> None:
        """Check that the object can be used."""
        if not callable(getattr(run, "log", None)) and (run is not None or writes_here()):
            raise TypeError(
                f"run must be an object with a method log(metrics, step=...), got {run!r}"
            )
        self.run = run
        self.alerts = flag("alerts", alerts)
        self.name = plugin_name(name, "tracker")

    @classmethod
    def example(cls) -> Tracker:
        """Return one whose tracker keeps what it is given."""
        return cls(_Kept())

    @hookimpl
    def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Hand on the metrics."""
        if writes_here():
            self.run.log(dict(metrics), step=number)

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Hand on the event."""
        if self.alerts and writes_here() and callable(getattr(self.run, "alert", None)):
            where = f" ({', '.join(event.tensors)})" if event.tensors else ""
            plugin = f"{event.plugin}: " if event.plugin else ""
            self.run.alert(
                title=f"stablekit: {event.kind}",
                text=f"step {event.step}: {plugin}{event.message}{where}",
            )


@final
class _Kept:
    """A tracker in memory."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, Any]]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.metrics.append((step, metrics))
