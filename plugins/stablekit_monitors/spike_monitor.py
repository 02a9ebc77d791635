"""Telling spikes of loss, gradient norm and update norm while they happen, with the tensors' names.

The rule is robust location and scale, followed online (:class:`RobustBaseline`). It is measured
next to the rules of OLMo-core (mean + 6 standard deviations of the last 128 steps) and of Lightning
(three times the mean of the last 10) by ``python -m benchmarks.detectors``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from stablekit import hookimpl
from stablekit.arguments import choice, number, plugin_name, whole
from stablekit.scalars import is_finite, where
from stablekit_monitors._norm_history import NormHistory, own_scores
from stablekit_monitors._spike_report import Herald, Scene
from stablekit_monitors._update_norms import UpdateNorms
from stablekit_monitors._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stablekit import Step
    from stablekit.scalars import Flag, Scalar

__all__ = ["SpikeMonitor", "own_scores"]

SIGNALS = ("loss", "norm", "update")
_STANDS_OUT = 0.5


@final
class SpikeMonitor:
    """Report spikes of the loss, the gradient norm and the update norm, and who made them.

    A value is a spike where it is more than ``threshold`` standard deviations above what is usual
    for its signal: see :class:`~stablekit.statistics.RobustBaseline`, which outliers do not move,
    and which is followed on a logarithmic scale for norms. A loss that is NaN or infinite is a
    severe spike, also in the warm-up; a norm that is not finite is the session's event "nonfinite"
    and no spike. Nothing is changed and nothing is skipped.

    Events, of which a spike of any length makes two, three where it worsens:

    * "spike", in its first step, and in the first severe one: ``signal``, ``value``, ``baseline``,
      ``score``, ``severity`` ("mild", or "severe" from twice the threshold), ``batch`` (what was
      observed, if a number or text), and in ``tensors`` up to ``top`` names, the worst first: those
      whose own norm stands out from their own last 32 by half the threshold or more, by
      ``tensor_scores`` (:func:`~stablekit_monitors.spike_monitor.own_scores`).
    * "spike-end", when ``merge_steps`` steps had none: ``signal``, ``start``, ``length`` (how many
      steps were spikes), ``peak``, ``peak_step``, ``peak_score``.
    * "level-shift", when outliers were usual for ``patience`` steps and the baseline starts anew:
      ``signal``, ``value``, ``baseline``, and ``start`` if it ends a spike.

    Metrics: ``score``, the highest of the step, and for each signal ``<signal>_score``,
    ``<signal>_baseline`` and ``<signal>_limit``, the value above which it would be a spike.

    Args:
        threshold: how many standard deviations are a spike, above 0. On the streams of
            ``benchmarks/detectors.py`` 6 finds 97% of the spikes with one false alarm in 17,600
            steps, 5 finds 99% with one in 6,600, 7 finds 95% with one in 39,600.
        signals: any of "loss" and "norm".
        warmup_steps: how many steps are learned from before there are spikes, at least 1.
        patience: how many more outliers than other steps make a new level, at least 2.
        merge_steps: spikes that are closer than this are one, at least 1.
        top: how many tensors to name at most.
        update_every: watch the norm of the update too, in every so many steps; None does not. It
            copies the parameters in such a step. For this signal ``warmup_steps``, ``patience`` and
            ``merge_steps`` count measured steps.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([("weight", p)], lr=0.1)
        >>> session = stablekit.attach(optimizer, SpikeMonitor(warmup_steps=10))
        >>> for step in range(1, 21):
        ...     p.grad = torch.ones(2) * (30.0 if step == 16 else 1.0)
        ...     optimizer.step()
        >>> event = session.events[0]
        >>> event.kind, event.step, event.data["signal"], event.data["severity"], event.tensors
        ('spike', 16, 'norm', 'severe', ('weight',))
    """

    cost = (
        "one read of the gradients; under DDP one reduction if a loss is observed; in steps that"
        " measure the update a copy of the parameters and a reduction where they are sharded"
    )

    def __init__(
        self,
        threshold: float = 6.0,
        *,
        signals: Sequence[str] = ("loss", "norm"),
        warmup_steps: int = 20,
        patience: int = 20,
        merge_steps: int = 10,
        top: int = 5,
        update_every: int | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start without statistics."""
        self.threshold = number("threshold", threshold, above=0)
        given = (signals,) if isinstance(signals, str) else signals
        self.signals = tuple(choice("signals", signal, SIGNALS[:2]) for signal in given)
        self.warmup_steps = whole("warmup_steps", warmup_steps, at_least=1)
        self.patience = whole("patience", patience, at_least=2)
        self.merge_steps = whole("merge_steps", merge_steps, at_least=1)
        self.top = whole("top", top)
        self.update_every = (
            None if update_every is None else whole("update_every", update_every, at_least=1)
        )
        self.needs = () if update_every is None else ("parameters",)
        self.name = plugin_name(name, "spike-monitor")
        self._watches = {signal: self._watch(signal) for signal in SIGNALS}
        self._gradients, self._updates = NormHistory(), NormHistory()
        self._copies = UpdateNorms()
        self._herald = Herald(top=self.top, least=_STANDS_OUT * self.threshold)
        self._scene: Scene | None = None
        self._counts: Flag = False
        self._is_whole: Flag = False
        self._highest: Scalar | None = None

    @classmethod
    def example(cls) -> SpikeMonitor:
        """Return one that is past its warm-up soon enough for the conformance checks."""
        return cls(warmup_steps=4, patience=4)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Judge loss and norm, and say so where one of them is a spike."""
        gradients = step.gradients
        scene = Scene(gradients.names, gradients.raw_norms(), self._gradients)
        total = step.scalar(gradients.raw_norm())
        self._highest, self._counts = None, step.flag(step.learning)
        if "loss" in self.signals and (loss := step.loss) is not None:
            self._judge(step, scene, "loss", step.scalar(loss.to(gradients.device)))
        if "norm" in self.signals:
            self._judge(step, scene, "norm", total)
        self._tell(step, scene)
        self._scene, self._is_whole = scene, is_finite(total)
        if self.update_every is not None and step.number % self.update_every == 0:
            self._copies.begin(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Learn from the step if it was not skipped, and measure the update."""
        scene, self._scene = self._scene, None
        if scene is None:  # a GradScaler found an overflow: there was nothing to observe
            return
        self._counts = self._counts & step.flag(step.ok)
        self._learn(step, scene)
        norms = self._copies.end(step)
        if norms is not None:
            update = Scene(scene.names, norms, self._updates)
            total = step.scalar(torch.linalg.vector_norm(norms))
            self._is_whole = is_finite(total)
            self._judge(step, update, "update", total)
            self._tell(step, update)
            self._learn(step, update)

    def state_dict(self) -> dict[str, Any]:
        """Return baselines and spikes of all signals, and the latest norms by parameter name."""
        gradients, updates = self._gradients.state_dict(), self._updates.state_dict()
        return {
            "signals": [watch.state_dict() for watch in self._watches.values()],
            **gradients,
            **{f"update_{key}": value for key, value in updates.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved statistics.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A number is not finite, or out of range.
        """
        saved = {entry["signal"]: entry for entry in state["signals"]}
        for signal, watch in self._watches.items():
            watch.load_state_dict(saved[signal])
        self._gradients.load_state_dict(state)
        updates = {"steps": state["update_steps"], "norms": state["update_norms"]}
        self._updates.load_state_dict(updates)

    def _watch(self, signal: str) -> Watch:
        return Watch(
            signal,
            threshold=self.threshold,
            warmup=self.warmup_steps,
            patience=self.patience,
            merge_steps=self.merge_steps,
        )

    def _judge(self, step: Step, scene: Scene, signal: str, value: Scalar) -> None:
        """Compare a value with what is usual, and keep the highest score of the step so far."""
        watch = self._watches[signal]
        verdict = watch.judge(step, value)
        scene.judged.append((watch, verdict))
        score, highest = verdict.score, self._highest
        self._highest = score if highest is None else where(score > highest, score, highest)

    def _tell(self, step: Step, scene: Scene) -> None:
        if self._highest is not None:
            step.record("score", self._highest)
        self._herald.tell(step, scene, when=self._counts)

    def _learn(self, step: Step, scene: Scene) -> None:
        self._herald.learn(step, scene, when=self._counts, is_whole=self._is_whole)
