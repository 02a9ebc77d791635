"""How often a run went back, and whether that got it any further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.arguments import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIELDS = ("last", "in_a_row", "total", "diverged_at")


@final
class Returns:
    """Counts returns, in all and without getting past the point at which the run diverged."""

    def __init__(self, *, cooldown: int, most: int) -> None:
        """Start with none.

        Args:
            cooldown: for how many steps after a return there should be no other.
            most: how many are allowed without getting past the trouble.
        """
        self.cooldown = cooldown
        self.most = most
        self.last = 0
        self.in_a_row = 0
        self.total = 0
        self.diverged_at = 0

    @property
    def are_used_up(self) -> bool:
        """Whether there were more than are allowed."""
        return self.in_a_row > self.most

    def is_cooling(self, step: int) -> bool:
        """Tell whether the last return was a moment ago."""
        return self.total > 0 and step - self.last <= self.cooldown

    def count(self, step: int, updates: int) -> None:
        """Note a return at this step, from so many updates."""
        self.diverged_at = max(updates, self.diverged_at if self.in_a_row else 0)
        self.last, self.in_a_row, self.total = step, self.in_a_row + 1, self.total + 1

    def reached(self, updates: int) -> None:
        """Note that the run is well after so many updates."""
        if updates > self.diverged_at:
            self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {field: getattr(self, field) for field in _FIELDS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved counts.

        Raises:
            TypeError: A count is not an integer.
            ValueError: A count is negative.
        """
        counts = [whole(field, state[field]) for field in _FIELDS]
        self.last, self.in_a_row, self.total, self.diverged_at = counts
