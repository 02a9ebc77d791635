"""The latest value of every metric, kept as tensors until someone asks for numbers."""

from __future__ import annotations

from typing import final

from torch import Tensor

from stablekit._mail import to_host


@final
class Metrics:
    """Name -> latest value, and how often each plugin clipped."""

    def __init__(self) -> None:
        """Start with no metric."""
        self._latest: dict[str, Tensor | float] = {}
        self._clipped: dict[str, Tensor] = {}

    def record(self, name: str, value: Tensor | float) -> None:
        """Keep a value; tensors stay where they are."""
        self._latest[name] = value.detach() if isinstance(value, Tensor) else float(value)

    def count_clipped(self, plugin: str, acted: Tensor) -> None:
        """Add a step to those in which a plugin clipped, where ``acted`` is true."""
        before = self._clipped.get(plugin)
        self._clipped[plugin] = acted.long() if before is None else before + acted

    def read(self) -> dict[str, float]:
        """Return plain floats, with one copy to the host for all tensors."""
        return _floats(self._latest)

    def clipped_steps(self) -> dict[str, int]:
        """Return in how many steps each plugin clipped."""
        counts = _floats(dict(self._clipped))
        return {name: int(count) if count == count else 0 for name, count in counts.items()}

    def restore_clipped(self, counts: dict[str, int]) -> None:
        """Continue counting clipped steps from these numbers."""
        from torch import tensor

        self._clipped = {name: tensor(count) for name, count in counts.items()}


def _floats(values: dict[str, Tensor | float]) -> dict[str, float]:
    names = [name for name, value in values.items() if isinstance(value, Tensor)]
    read = dict(
        zip(names, to_host([v for v in values.values() if isinstance(v, Tensor)]), strict=True)
    )
    return {name: float(read.get(name, value)) for name, value in values.items()}
