"""Timing of several cases in turn, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@final
@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Args:
        name: what it is called in the timings.
        run: what is timed.
        prepare: what happens before every repetition, untimed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@final
class Timings:
    """Seconds of every repetition of every case; repetition number i of all cases is one round."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        """Keep the seconds by case."""
        self._seconds = seconds

    def seconds(self, name: str) -> list[float]:
        """Return the seconds of every repetition of a case."""
        return list(self._seconds[name])

    def median(self, name: str) -> float:
        """Return the median of a case."""
        return statistics.median(self._seconds[name])

    def added(self, name: str, over: str) -> float:
        """Return what a case costs more than another: the median of the rounds' differences."""
        pairs = zip(self._seconds[name], self._seconds[over], strict=True)
        return statistics.median(a - b for a, b in pairs)


def interleave(
    cases: Sequence[Case],
    repetitions: int,
    *,
    warmup: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run all cases in turn, round after round, each round beginning with another of them.

    Args:
        cases: what to time.
        repetitions: how many rounds are kept.
        warmup: how many rounds before them are not.
        clock: returns seconds.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + repetitions):
            first = number % len(cases)
            for case in (*cases[first:], *cases[:first]):
                elapsed = _once(case, clock)
                if number >= warmup:
                    seconds[case.name].append(elapsed)
    finally:
        gc.enable()
    return Timings(seconds)


def _once(case: Case, clock: Callable[[], float]) -> float:
    if case.prepare is not None:
        case.prepare()
    start = clock()
    case.run()
    return clock() - start
