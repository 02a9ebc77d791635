"""What a session reports when something out of the ordinary happens in a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, final

__all__ = ["Event"]


@final
@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened at one step, in plain values only.

    Kinds emitted by stablekit itself: ``"nonfinite"`` (``data["kind"]`` is ``"nan"``, ``"inf"`` or
    ``"overflow"``), ``"skip"`` (a plugin asked for the step to be skipped) and ``"scaler-skip"``
    (a GradScaler found an overflow). Plugins add their own.

    Example:
        >>> Event("skip", step=3, plugin="nonfinite-guard", message="non-finite gradients").kind
        'skip'
    """

    kind: str
    """What happened, one word."""
    step: int
    """Number of the step, as ``Step.number``."""
    plugin: str = ""
    """Name of the plugin that said so; empty for the session itself."""
    message: str = ""
    """One sentence for a person."""
    tensors: tuple[str, ...] = ()
    """Names of the parameters concerned, worst first where there is an order."""
    data: dict[str, Any] = field(default_factory=dict)
    """Everything else, as numbers, strings and lists of them."""

    def as_dict(self) -> dict[str, Any]:
        """Return the event as a dictionary of plain values, for logs and checkpoints."""
        return {**asdict(self), "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Event:
        """Return the event that :meth:`as_dict` described."""
        return cls(**{**values, "tensors": tuple(values["tensors"])})
