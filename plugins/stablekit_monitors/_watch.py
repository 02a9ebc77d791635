"""One signal under watch: what is usual for it, and the spike that is going on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.statistics import RobustBaseline
from stablekit_monitors._episode import Episode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step
    from stablekit.scalars import Scalar
    from stablekit.statistics import Verdict


@final
class Watch:
    """A baseline, which may live on a device, and an episode, which lives on the host.

    Args:
        signal: "loss", which may be of either sign and where NaN and Inf are spikes; or "norm" or
            "update", which vary by factors and where they are none: the session reports them.
        threshold: see SpikeMonitor, as are the others.
    """

    def __init__(
        self, signal: str, *, threshold: float, warmup: int, patience: int, merge_steps: int
    ) -> None:
        """Start without a value."""
        self.signal = signal
        self.baseline = RobustBaseline(
            threshold=threshold,
            warmup=warmup,
            patience=patience,
            scale="linear" if signal == "loss" else "log",
        )
        self.episode = Episode(threshold=threshold, merge_steps=merge_steps)
        self._keys = tuple(f"{signal}_{what}" for what in ("score", "baseline", "limit"))

    def judge(self, step: Step, value: Scalar) -> Verdict:
        """Compare a value with what is usual, and record it."""
        verdict = self.baseline.judge(value)
        told = (verdict.score, verdict.baseline, verdict.limit)
        for key, number in zip(self._keys, told, strict=True):
            step.record(key, number)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Return both parts."""
        episode = self.episode.state_dict()
        return {"signal": self.signal, **self.baseline.state_dict(), "episode": episode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from both parts.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A field is out of range.
        """
        self.baseline.load_state_dict(state)
        self.episode.load_state_dict(state["episode"])
