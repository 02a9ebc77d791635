"""Streams of losses and norms in which it is known where the spikes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Values = NDArray[np.float64]

STEPS = 1000
AFTERMATH = 40
"""For so many steps after a fault in a recorded run it may be felt: alarms there do not count."""
_RUNS = Path(__file__).with_name("labelled_runs.npz")


@final
@dataclass(frozen=True)
class Stream:
    """One value a step, and the steps that a person would call a spike."""

    name: str
    group: str
    """What the stream is about, a line of the table."""
    signal: str
    """"loss" or "norm"."""
    values: Values
    spikes: tuple[tuple[int, int], ...] = ()
    """Half-open intervals of steps; the onset of a level that then stays is one too."""
    settling: tuple[tuple[int, int], ...] = ()
    """Steps in which an alarm is neither right nor wrong."""


def streams(seeds: Sequence[int] = (0, 1, 2)) -> Iterator[Stream]:
    """Yield the synthetic streams, each with noise of these seeds."""
    for number, (group, (signal, make)) in enumerate(_GROUPS.items()):
        for seed in seeds:
            noise = np.random.default_rng([seed, number])
            for name, values, spikes, settling in make(noise):
                yield Stream(f"{name}, seed {seed}", group, signal, values, spikes, settling)


def recorded() -> Iterator[Stream]:
    """Yield losses and norms of the training runs that labelled_record.py made."""
    with np.load(_RUNS) as runs:
        for run in sorted({key.partition("/")[0] for key in runs}):
            faults = runs[f"{run}/faults"].tolist()
            for signal in ("loss", "norm"):
                group = f"recorded {signal}, {'with' if faults else 'without'} faults"
                spikes = _joined(runs[f"{run}/{signal} spikes"].tolist())
                values = runs[f"{run}/{signal}"].astype(np.float64)
                settling = tuple((t, t + AFTERMATH) for t in faults)
                yield Stream(run, group, signal, values, spikes, settling)


def _joined(steps: list[int]) -> tuple[tuple[int, int], ...]:
    """Return runs of consecutive steps as intervals."""
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step + 1 for step in steps if step + 1 not in steps]
    return tuple(zip(starts, ends, strict=True))


Made = tuple[str, "Values", tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


def curve(noise: np.random.Generator, spread: float = 0.02) -> Values:
    """Return a loss like that of a language model: a fall from 11 to 2.6, noise in proportion."""
    t = np.arange(STEPS)
    level = 2.4 + 6.0 * np.exp(-t / 40) + 2.6 * (1 + t / 20) ** -0.6
    return np.asarray(level * (1 + spread * noise.standard_normal(STEPS)))


def norms(noise: np.random.Generator, spread: float = 0.2) -> Values:
    """Return gradient norms: high at first, then about 0.5, slowly rising, log-normal noise."""
    t = np.arange(STEPS)
    level = 0.4 + 3.0 * np.exp(-t / 30) + 0.0003 * t
    return np.asarray(level * np.exp(spread * noise.standard_normal(STEPS)))


def _put(values: Values, start: int, height: float, length: int = 1) -> tuple[int, int]:
    """Multiply by a spike that decays to a third of its height over its length."""
    decay = np.exp(-1.1 * np.arange(length) / max(length - 1, 1)) if length > 1 else np.ones(1)
    values[start : start + length] *= 1 + (height - 1) * decay
    return start, start + length


def _clean_curves(noise: np.random.Generator) -> Iterator[Made]:
    yield "2% noise", curve(noise), (), ()
    yield "10% noise", curve(noise, 0.1), (), ()


def _flat(noise: np.random.Generator) -> Iterator[Made]:
    yield "constant", np.full(STEPS, 0.7), (), ()
    yield "zero", np.zeros(STEPS), (), ()
    yield "rounding", 0.7 * (1 + 1e-6 * noise.standard_normal(STEPS)), (), ()
    yield "two values", np.where(noise.random(STEPS) < 0.5, 0.7, 0.700001), (), ()


def _heavy(noise: np.random.Generator) -> Iterator[Made]:
    yield "student t, 3 degrees", np.abs(2.0 + 0.15 * noise.standard_t(3, STEPS)), (), ()
    yield "gamma, small batch", noise.gamma(4.0, 0.5, STEPS), (), ()


def _wandering(noise: np.random.Generator) -> Iterator[Made]:
    for rho in (0.5, 0.9):
        walk = np.zeros(STEPS)
        for t in range(1, STEPS):
            walk[t] = rho * walk[t - 1] + noise.standard_normal()
        yield f"autocorrelation {rho}", 2.5 + 0.05 * walk, (), ()


def _batch_size(noise: np.random.Generator) -> Iterator[Made]:
    spread = np.where(np.arange(STEPS) < 500, 0.02, 0.08)
    yield "4 times the noise", 2.5 * (1 + spread * noise.standard_normal(STEPS)), (), ((500, 550),)


def _heights(noise: np.random.Generator) -> Iterator[Made]:
    for height in (1.3, 2.0, 5.0, 20.0):
        values = curve(noise)
        spikes = tuple(_put(values, start, height) for start in (150, 300, 450, 600, 750, 900))
        yield f"{height:g} times", values, spikes, ()


def _lengths(noise: np.random.Generator) -> Iterator[Made]:
    for length in (3, 10, 30):
        values = curve(noise)
        spikes = tuple(_put(values, start, 2.5, length) for start in (200, 500, 800))
        yield f"{length} steps", values, spikes, ()


def _clusters(noise: np.random.Generator) -> Iterator[Made]:
    values = curve(noise)
    spikes = tuple(
        _put(values, s, 2.0) for start in (300, 700) for s in range(start, start + 24, 3)
    )
    yield "every third step", values, spikes, ()
    values = curve(noise)
    large = tuple(_put(values, start, 20.0) for start in (250, 500, 750))
    small = tuple(_put(values, start + gap, 1.5) for start, _ in large for gap in (15, 40, 80))
    yield "small after large", values, large + small, ()


def _ramps(noise: np.random.Generator) -> Iterator[Made]:
    for length in (10, 30, 100, 300):
        values = curve(noise)
        rise = np.clip((np.arange(STEPS) - 500) / length, 0, 1)
        end = 500 + length
        yield f"in {length} steps", values * (1 + 2 * rise), ((500, end),), ((end, end + 40),)


def _nonfinite(noise: np.random.Generator, bad: float) -> Iterator[Made]:
    for length in (1, 5):
        values = curve(noise)
        late = tuple(_put(values, start, 2.0) for start in (350, 700, 900))
        values[300 : 300 + length] = bad
        values[600 : 600 + length] = bad
        yield f"{length} steps", values, (*late, (300, 300 + length), (600, 600 + length)), ()


def _shifts(noise: np.random.Generator, factors: tuple[float, ...]) -> Iterator[Made]:
    for factor in factors:
        values = curve(noise)
        values[400:] *= factor
        late = tuple(_put(values, start, 2.0) for start in (550, 750, 900))
        onset = ((400, 405),) if factor > 1 else ()
        yield f"{factor:g} times", values, onset + late, ((405, 440),) if factor > 1 else ()


def _early(noise: np.random.Generator) -> Iterator[Made]:
    for start in (0, 1, 3, 8, 15):
        values = curve(noise)
        _put(values, start, 20.0)
        late = tuple(_put(values, s, 3.0) for s in (60, 100, 200))
        yield f"step {start}", values, late, ((start, start + 1),)


def _vanishing(noise: np.random.Generator) -> Iterator[Made]:
    t = np.arange(STEPS)
    values = 2.3 * np.exp(-t / 60) + 1e-4 * np.exp(1.5 * noise.standard_normal(STEPS))
    spikes = []
    for start in (500, 700, 900):
        values[start] += 0.5
        spikes.append((start, start + 1))
    yield "to 0.0001", values, tuple(spikes), ()


def _clean_norms(noise: np.random.Generator) -> Iterator[Made]:
    for spread in (0.05, 0.2, 0.5):
        yield f"log-normal {spread:g}", norms(noise, spread), (), ()
    t = np.arange(STEPS)
    rising = np.asarray(0.01 * (1 + t) * np.exp(0.1 * noise.standard_normal(STEPS)))
    yield "rising from 0.01 to 10", rising, (), ()
    some = norms(noise)
    some[::7] = 0.0
    yield "every seventh is zero", some, (), ()
    yield "student t in logs", 0.5 * np.exp(0.15 * noise.standard_t(3, STEPS)), (), ()


def _norm_heights(noise: np.random.Generator) -> Iterator[Made]:
    for height in (3.0, 5.0, 20.0, 1000.0):
        values = norms(noise, 0.15)
        spikes = tuple(_put(values, start, height) for start in (150, 300, 450, 600, 750, 900))
        yield f"{height:g} times", values, spikes, ()


def _norm_clusters(noise: np.random.Generator) -> Iterator[Made]:
    values = norms(noise, 0.15)
    spikes = tuple(
        _put(values, s, 5.0) for start in (300, 700) for s in range(start, start + 24, 3)
    )
    yield "every third step", values, spikes, ()
    values = norms(noise, 0.15)
    large = tuple(_put(values, start, 1000.0) for start in (250, 500, 750))
    small = tuple(_put(values, start + gap, 4.0) for start, _ in large for gap in (15, 40, 80))
    yield "small after large", values, large + small, ()


_GROUPS: dict[str, tuple[str, Callable[[np.random.Generator], Iterator[Made]]]] = {
    "no spike: falling loss": ("loss", _clean_curves),
    "no spike: constant": ("loss", _flat),
    "no spike: heavy tails": ("loss", _heavy),
    "no spike: wandering level": ("loss", _wandering),
    "no spike: noise grows 4 times": ("loss", _batch_size),
    "loss spikes by height": ("loss", _heights),
    "loss spikes by length": ("loss", _lengths),
    "loss spikes in clusters": ("loss", _clusters),
    "loss that drifts away": ("loss", _ramps),
    "loss NaN": ("loss", lambda noise: _nonfinite(noise, np.nan)),
    "loss Inf": ("loss", lambda noise: _nonfinite(noise, np.inf)),
    "level shift up, then spikes": ("loss", lambda noise: _shifts(noise, (1.5, 4.0))),
    "level shift down, then spikes": ("loss", lambda noise: _shifts(noise, (0.7, 0.2))),
    "loss spike in the warm-up": ("loss", _early),
    "loss that vanishes": ("loss", _vanishing),
    "no spike: norms": ("norm", _clean_norms),
    "norm spikes by height": ("norm", _norm_heights),
    "norm spikes in clusters": ("norm", _norm_clusters),
}
