"""The latest value of every metric, kept as tensors until someone asks for numbers."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, final

from torch import Tensor

from stablekit._mail import to_host

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit.scalars import Flag


@final
class Metrics:
    """Name -> latest value, and how often each plugin clipped."""

    def __init__(self) -> None:
        """Start with no metric."""
        self._latest: dict[str, Tensor | float] = {}
        self._fresh: dict[str, Tensor | float] = {}
        self._clipped: dict[str, Tensor | float] = {}

    def record(self, name: str, value: Tensor | float) -> None:
        """Keep a value; tensors stay where they are."""
        kept = value.detach() if isinstance(value, Tensor) else float(value)
        self._latest[name] = self._fresh[name] = kept

    def begin(self) -> None:
        """Start a step: nothing was recorded in it yet."""
        self._fresh = {}

    def of_step(self) -> Mapping[str, Tensor | float]:
        """Return what was recorded since the step began."""
        return MappingProxyType(self._fresh)

    def nothing_clipped(self) -> None:
        """Say of a skipped step that no plugin clipped anything in it."""
        for name in self._latest:
            if name.endswith("/clipped"):
                self.record(name, 0.0)

    def forget(self, name: str) -> None:
        """Drop a value that does not hold for the latest step."""
        self._latest.pop(name, None)
        self._fresh.pop(name, None)

    def count_clipped(self, plugin: str, acted: Flag) -> None:
        """Add a step to those in which a plugin clipped, where ``acted`` is true."""
        self._clipped[plugin] = self._clipped.get(plugin, 0) + acted

    def read(self) -> dict[str, float]:
        """Return plain floats, with one copy to the host for all tensors."""
        return _floats(self._latest)

    def clipped_steps(self) -> dict[str, int]:
        """Return in how many steps each plugin clipped."""
        counts = _floats(dict(self._clipped))
        return {name: int(count) if count == count else 0 for name, count in counts.items()}

    def restore_clipped(self, counts: dict[str, int]) -> None:
        """Continue counting clipped steps from these numbers."""
        self._clipped = dict(counts)


def _floats(values: dict[str, Tensor | float]) -> dict[str, float]:
    names = [name for name, value in values.items() if isinstance(value, Tensor)]
    read = dict(
        zip(names, to_host([v for v in values.values() if isinstance(v, Tensor)]), strict=True)
    )
    return {name: float(read.get(name, value)) for name, value in values.items()}
