"""What the spike monitor says, and when: at once on the host, or when a device's values arrive."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Step
    from stablekit.scalars import Flag
    from stablekit.statistics import Verdict
    from stablekit_monitors._norm_history import NormHistory
    from stablekit_monitors._watch import Watch

    Culprits = Callable[[], list[tuple[str, float]]]

_SAID = 3


@final
class Scene:
    """What a step shows: norms of tensors, their past, and the judged signals."""

    def __init__(self, names: tuple[str, ...], norms: Tensor, history: NormHistory) -> None:
        """Start with no signal judged."""
        self.names = names
        self.norms = norms
        self.history = history
        self.judged: list[tuple[Watch, Verdict]] = []

    def watches(self) -> list[Watch]:
        """Return what was judged, without the verdicts, which may live on a device."""
        return [watch for watch, _ in self.judged]


@final
class Herald:
    """Emits what there is to say about a step.

    Args:
        top: how many tensors to name.
        least: the least own score of a tensor that is named.
    """

    def __init__(self, *, top: int, least: float) -> None:
        """Keep the limits."""
        self.top = top
        self.least = least

    def tell(self, step: Step, scene: Scene, *, when: Flag) -> None:
        """Follow every signal's spike, and emit what is news in a step that counts."""
        batch = step.session.batch
        told = {"batch": batch} if isinstance(batch, (int, str)) else {}
        if isinstance(when, Tensor):
            hear = partial(self._hear, step, scene.watches(), scene.names, scene.history, told)
            step.defer(hear, when, scene.norms, *_numbers(scene, when))
        elif when:
            find = partial(self._worst, scene.history, scene.names, scene.norms)
            for watch, verdict in scene.judged:
                heard = verdict.score, verdict.value, verdict.baseline
                _follow(step, watch, find, told, *map(float, heard))

    def learn(self, step: Step, scene: Scene, *, when: Flag, is_whole: Flag) -> None:
        """Learn from a step that counts, and emit where a baseline gave up its level.

        Args:
            step: the step.
            scene: what it shows.
            when: whether the step counts.
            is_whole: whether its norms are finite.
        """
        gave_up = [watch.baseline.learn(verdict, when=when) for watch, verdict in scene.judged]
        if isinstance(when, Tensor):
            hear = partial(_hear_of_learning, step, scene.watches(), scene.names, scene.history)
            flags = [torch.as_tensor(flag) for flag in gave_up]
            step.defer(hear, when & is_whole, scene.norms, *flags, *_numbers(scene, when))
            return
        for flag, (watch, verdict) in zip(gave_up, scene.judged, strict=True):
            if flag:
                _shifted(step, watch, float(verdict.value), float(verdict.baseline))
        if when and is_whole:
            scene.history.push(scene.names, scene.norms)

    def _hear(
        self,
        step: Step,
        watches: list[Watch],
        names: tuple[str, ...],
        history: NormHistory,
        told: dict[str, Any],
        when: float,
        norms: list[float],
        *numbers: float,
    ) -> None:
        """Take in what was judged on the device some steps ago."""
        if when:
            find = partial(self._worst, history, names, torch.tensor(norms))
            for i, watch in enumerate(watches):
                _follow(step, watch, find, told, *numbers[3 * i : 3 * i + 3])

    def _worst(
        self, history: NormHistory, names: tuple[str, ...], norms: Tensor
    ) -> list[tuple[str, float]]:
        return history.worst(names, norms, top=self.top, least=self.least)


def _hear_of_learning(
    step: Step,
    watches: list[Watch],
    names: tuple[str, ...],
    history: NormHistory,
    when: float,
    norms: list[float],
    *numbers: float,
) -> None:
    """Take in what was learned on the device some steps ago."""
    gave_up, heard = numbers[: len(watches)], numbers[len(watches) :]
    for i, watch in enumerate(watches):
        if gave_up[i]:
            _shifted(step, watch, *heard[3 * i + 1 : 3 * i + 3])
    if when:
        history.push(names, torch.tensor(norms))


def _numbers(scene: Scene, like: Tensor) -> list[Tensor]:
    """Return score, value and baseline of each signal as 0-dim tensors on the device."""
    return [
        torch.as_tensor(number, device=like.device)
        for _, verdict in scene.judged
        for number in (verdict.score, verdict.value, verdict.baseline)
    ]


def _follow(
    step: Step,
    watch: Watch,
    find: Culprits,
    told: dict[str, Any],
    score: float,
    value: float,
    baseline: float,
) -> None:
    """Follow a signal by another step, and emit what is news."""
    news = watch.episode.follow(step.number, score, value)
    if news == "end":
        _ended(step, watch)
    elif news:
        culprits = find()
        named = [name for name, _ in culprits]
        said = f"; most unusual in {', '.join(named[:_SAID])}" if named else ""
        step.emit(
            "spike",
            f"{watch.signal} is {value:.4g} where {baseline:.4g} is usual"
            f" (score {score:.1f}, {news}){said}",
            tensors=named,
            signal=watch.signal,
            value=value,
            baseline=baseline,
            score=score,
            severity=news,
            tensor_scores=[own for _, own in culprits],
            **told,
        )


def _ended(step: Step, watch: Watch) -> None:
    episode = watch.episode
    lasted = f"{episode.length} step{'s' if episode.length > 1 else ''}"
    step.emit(
        "spike-end",
        f"{watch.signal} is usual again; the spike of step {episode.start} lasted {lasted} and"
        f" reached {episode.peak:.4g} in step {episode.peak_step}",
        signal=watch.signal,
        start=episode.start,
        length=episode.length,
        peak=episode.peak,
        peak_step=episode.peak_step,
        peak_score=episode.peak_score,
    )


def _shifted(step: Step, watch: Watch, value: float, baseline: float) -> None:
    began: dict[str, Any] = {"start": watch.episode.start} if watch.episode.close() else {}
    step.emit(
        "level-shift",
        f"{watch.signal} stays near {value:.4g} where {baseline:.4g} was usual; what is usual is"
        " learned anew from here",
        signal=watch.signal,
        value=value,
        baseline=baseline,
        **began,
    )
