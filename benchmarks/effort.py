"""How often everything is repeated, and by which clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from benchmarks.interleave import Timings, interleave

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.interleave import Case
    from benchmarks.workloads import Workload


@final
@dataclass(frozen=True)
class Effort:
    """Repetitions for a full or a quick run.

    Args:
        quick: only see whether everything runs.
        cpu_clock: count the time this thread has the processor, not the time on the wall; the same
            on an idle machine, and better on a busy one, but it knows one thread only.
    """

    quick: bool = False
    cpu_clock: bool = False

    def time(self, cases: Sequence[Case], repetitions: int, *, warmup: int = 5) -> Timings:
        """Run the cases in turn."""
        clock = time.thread_time if self.cpu_clock else time.perf_counter
        return interleave(cases, repetitions, warmup=warmup, clock=clock)

    def repetitions(self, workload: Workload, *, slow: bool = False) -> int:
        """Return how many rounds to time; fewer where one of the cases takes a second."""
        if self.quick:
            return 2 if workload.name == "gpt2" else 5
        if workload.name == "gpt2":
            return 9 if slow else 25
        return 200 if slow else 500

    @property
    def processes(self) -> int:
        """How many fresh processes to start for each case of the start-up rows."""
        return 1 if self.quick else 9

    @property
    def blocks(self) -> int:
        """How many blocks of steps to time for AutoClip."""
        return 2 if self.quick else 40
