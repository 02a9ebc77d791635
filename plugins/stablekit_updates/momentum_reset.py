"""Clearing an optimizer's moments at fixed intervals, whatever the optimizer.

Huang et al.: SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training (arXiv 2501.06842).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit import hookimpl
from stablekit.arguments import plugin_name, whole
from stablekit.moments import Resets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["MomentumReset"]


@final
class MomentumReset:
    """Set the moments to zero, and their step count, after every ``interval`` updates.

    What a spike left in the moments is forgotten. The update that follows is made as a first one:
    with bias corrections of a first step, so it is as large as ``lr`` for Adam. SPAM resets before
    an update, keeps the step count and lowers the learning rate instead; that is the plugin
    ``"spam"``. The event "reset" says which moments there were to clear; an optimizer with other
    names for them than :mod:`stablekit.moments` knows is refused.

    Args:
        interval: updates between two resets, at least 1.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``interval`` is not an integer.
        ValueError: ``interval`` is below 1.
        AttachError: The optimizer keeps no moments.

    Example:
        >>> import torch, stablekit
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stablekit.wrap(torch.optim.AdamW([w]), MomentumReset(2))
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        >>> stablekit.session(optimizer).events[0].data
        {'moments': ['exp_avg', 'exp_avg_sq']}
        >>> optimizer.state[w]["exp_avg"]
        tensor([0.])
    """

    cost = "a write of the moments every so many updates"
    needs = ("parameters",)

    def __init__(self, interval: int, *, name: str | None = None) -> None:
        """Check the interval."""
        self.interval = whole("interval", interval, at_least=1)
        self.name = plugin_name(name, "momentum-reset")
        self._resets = Resets(self.interval, self.name)

    @classmethod
    def example(cls) -> MomentumReset:
        """Return an instance that resets within a short run."""
        return cls(5)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Clear the moments where a reset is due."""
        self._resets.check(step)
        if self._resets.is_due(step):
            self._resets.rewind(step)
            self._resets.clear(step)

    @hookimpl
    def on_skip(self, step: Step) -> None:
        """Repeat a reset that was due in a step which turned out to be skipped."""
        self._resets.missed(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the update of the latest reset."""
        return {"reset_at": self._resets.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: It is negative.
        """
        self._resets.last = whole("reset_at", state["reset_at"])
