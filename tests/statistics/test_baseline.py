"""A robust baseline learns what is usual, and nothing from outliers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekit.statistics import RobustBaseline
from tests.monitors.labelled import streams

SCALES = ("linear", "log")
scales = pytest.mark.parametrize("scale", SCALES)
modes = pytest.mark.parametrize("on_device", [False, True], ids=["floats", "tensors"])

ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
USUAL = st.floats(2.0**-7, 128.0, width=32)
STREAM = st.lists(st.one_of(USUAL, USUAL, USUAL, ANY), max_size=80)


class Naive:
    """The rule as its docstring says it, with branches instead of selections."""

    def __init__(self, scale: str, threshold: float, warmup: int, patience: int) -> None:
        self.scale, self.threshold, self.warmup, self.patience = scale, threshold, warmup, patience
        self.values: list[float] = []
        self.level = self.spread = self.highest = 0.0
        self.strain = 0

    def take(self, value: float, learns: bool = True) -> tuple[float, bool]:
        """Return score and whether the level was given up."""
        if not math.isfinite(value) or (self.scale == "log" and value <= 0):
            return (0.0 if self.scale == "log" else math.inf), False
        x = math.log(value) if self.scale == "log" else value
        level = self.level if self.values else x
        d = x - level
        linear = 0.01 * max(abs(level), 0.1 * self.highest, 1e-30)
        noise = 0.05 if self.scale == "log" else linear
        spread = self.spread * (1 + 10 / (len(self.values) + 1))
        sigma = math.sqrt(math.pi / 2) * max(spread, noise)
        is_ready = len(self.values) >= self.warmup
        score = d / sigma if is_ready else 0.0
        if not learns:
            return score, False
        self.strain = self.strain + 1 if abs(score) > self.threshold else max(0, self.strain - 1)
        if self.strain >= self.patience:
            self.values, self.level, self.spread, self.strain = [x], x, 0.0, 0
            self.highest = abs(x)
            return score, True
        if score <= self.threshold:
            self._enter(x, d, self.threshold * sigma, is_ready)
        return score, False

    def _enter(self, x: float, d: float, margin: float, is_ready: bool) -> None:
        step = min(d, margin)
        if is_ready:
            step = max(step, -margin)
        n = len(self.values) + 1
        if n == 1:
            self.level = x
        own = step if step > 0 else min(-step, abs(x - self.values[-1]) if self.values else 0.0)
        if n <= 2:
            own = 0.0
        self.level += max(1 / n, 0.05 if step > 0 else 0.2) * step
        self.spread += max(1 / n, 0.01) * (own - self.spread)
        self.highest = max(self.highest, abs(self.level))
        self.values.append(x)


def scores(
    baseline: RobustBaseline, values: list[float], *, on_device: bool = False
) -> list[tuple[float, bool]]:
    """Judge and learn from values; return scores and where the level was given up."""
    seen = []
    for value in values:
        given: Any = torch.tensor(value) if on_device else value
        verdict = baseline.judge(given)
        gave_up = baseline.learn(verdict, when=torch.tensor(True) if on_device else True)
        seen.append((float(verdict.score), bool(gave_up)))
    return seen


def fresh(scale: str = "linear", *, warmup: int = 4, patience: int = 5) -> RobustBaseline:
    return RobustBaseline(threshold=6.0, warmup=warmup, patience=patience, scale=scale)


@scales
@given(values=STREAM, warmup=st.integers(1, 12), patience=st.integers(2, 12))
def test_it_is_the_rule_of_its_docstring(
    scale: str, values: list[float], warmup: int, patience: int
) -> None:
    naive = Naive(scale, 6.0, warmup, patience)
    ours = RobustBaseline(threshold=6.0, warmup=warmup, patience=patience, scale=scale)
    for (score, gave_up), value in zip(scores(ours, values), values, strict=True):
        expected, expected_to = naive.take(value)
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert gave_up == expected_to


@scales
@modes
@given(falls=st.lists(st.floats(0.5, 1.0, width=32), max_size=60))
def test_a_stream_that_never_rises_has_no_outlier(
    scale: str, on_device: bool, falls: list[float]
) -> None:
    values, level = [], 1000.0
    for fall in falls:
        level *= fall
        values.append(level)
    assert all(score <= 1e-3 for score, _ in scores(fresh(scale), values, on_device=on_device))


@given(values=st.lists(USUAL, max_size=60), power=st.integers(-20, 20))
def test_units_do_not_matter(values: list[float], power: int) -> None:
    scaled = [value * 2.0**power for value in values]
    assert scores(fresh(), scaled) == scores(fresh(), values)
    for (a, _), (b, _) in zip(
        scores(fresh("log"), scaled), scores(fresh("log"), values), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@scales
@modes
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, 3e38])
def test_a_constant_stream_has_score_zero_forever(
    scale: str, on_device: bool, value: float
) -> None:
    seen = scores(fresh(scale), [value] * 60, on_device=on_device)
    assert all(abs(score) < 1e-3 and not gave_up for score, gave_up in seen)


@scales
@modes
def test_rounding_noise_on_a_constant_is_no_outlier(scale: str, on_device: bool) -> None:
    values = [0.7 * (1 + 1e-6 * (i * 7919 % 13)) for i in range(200)]
    assert all(abs(s) < 0.1 for s, _ in scores(fresh(scale), values, on_device=on_device))


@scales
@modes
@pytest.mark.parametrize("outlier", [20.0, 1e6, math.nan, math.inf])
def test_outliers_do_not_move_what_is_usual(scale: str, on_device: bool, outlier: float) -> None:
    baseline = fresh(scale)
    scores(baseline, [1.0, 1.1, 0.9, 1.0, 1.1, 0.9], on_device=on_device)
    before = baseline.state_dict()
    ((score, _),) = scores(baseline, [outlier], on_device=on_device)
    assert score > 6 or (scale == "log" and not math.isfinite(outlier) and score == 0)
    after = baseline.state_dict()
    assert {**after, "strain": 0} == before
    assert after["strain"] == (1 if math.isfinite(outlier) else 0)


@scales
@modes
def test_a_step_that_does_not_count_changes_nothing(scale: str, on_device: bool) -> None:
    baseline = fresh(scale, patience=2)
    scores(baseline, [1.0] * 8, on_device=on_device)
    before = baseline.state_dict()
    for value in (1.0, 50.0, 50.0, 50.0, math.nan, 0.0):
        given: Any = torch.tensor(value) if on_device else value
        no: Any = torch.tensor(False) if on_device else False
        assert not baseline.learn(baseline.judge(given), when=no)
    assert baseline.state_dict() == before


@scales
@modes
@pytest.mark.parametrize("level", [10.0, 1e4, 0.05])
def test_a_level_that_stays_is_given_way_to_after_patience(
    scale: str, on_device: bool, level: float
) -> None:
    baseline = fresh(scale, patience=5)
    seen = scores(baseline, [1.0] * 20 + [level] * 40, on_device=on_device)
    assert [i for i, (_, gave_up) in enumerate(seen) if gave_up] == [24]
    assert all(abs(score) < 1e-3 for score, _ in seen[25:])
    assert scores(baseline, [3 * level], on_device=on_device)[0][0] > 6


@scales
def test_noise_that_grows_fifty_times_is_what_is_usual_in_the_end(scale: str) -> None:
    noise = torch.Generator().manual_seed(0)
    small = 0.01 * torch.randn(100, generator=noise)
    large = 0.5 * torch.randn(300, generator=noise)
    values = torch.cat([small, large])
    values = values.exp() if scale == "log" else 10 + values
    seen = scores(fresh(scale, patience=20), values.tolist())
    assert sum(score > 6 for score, _ in seen[250:]) <= 1


@modes
def test_a_loss_that_has_vanished_is_measured_by_where_it_came_from(on_device: bool) -> None:
    falling = [10.0 * 0.9**i for i in range(900)]
    for value, is_outlier in ((0.07, False), (0.08, True)):
        seen = scores(fresh(), [*falling, value], on_device=on_device)
        assert (seen[-1][0] > 6) == is_outlier


@modes
def test_alternating_outliers_are_never_taken_for_the_level(on_device: bool) -> None:
    values = [1.0] * 10 + [1.0, 30.0] * 50
    seen = scores(fresh(), values, on_device=on_device)
    assert not any(gave_up for _, gave_up in seen)
    assert all(score > 6 for score, _ in seen[11::2])


def test_a_limit_is_where_the_score_is_the_threshold() -> None:
    for scale in SCALES:
        baseline = fresh(scale)
        scores(baseline, [1.0, 1.3, 0.8, 1.1, 1.0])
        limit = baseline.judge(1.0).limit
        assert float(baseline.judge(limit).score) == pytest.approx(6.0)


@scales
@given(values=st.lists(ANY, max_size=40))
@modes
def test_state_stays_finite_whatever_comes(
    scale: str, on_device: bool, values: list[float]
) -> None:
    baseline = fresh(scale, patience=2)
    scores(baseline, values, on_device=on_device)
    assert all(math.isfinite(number) for number in baseline.state_dict().values())


@scales
@given(values=STREAM, cut=st.integers(0, 80))
@modes
def test_a_saved_baseline_goes_on_with_the_same_bits(
    scale: str, on_device: bool, values: list[float], cut: int
) -> None:
    straight, first, second = fresh(scale), fresh(scale), fresh(scale)
    whole = scores(straight, values, on_device=on_device)
    scores(first, values[:cut], on_device=on_device)
    second.load_state_dict(first.state_dict())
    assert scores(second, values[cut:], on_device=on_device) == whole[cut:]
    assert second.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("seen", -1, ValueError),
        ("strain", 0.5, TypeError),
        ("level", math.nan, ValueError),
        ("level", 1e39, ValueError),
        ("spread", -0.1, ValueError),
        ("highest", "1", TypeError),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(
    field: str, value: object, error: type[Exception]
) -> None:
    baseline = fresh()
    scores(baseline, [1.0, 2.0, 3.0])
    before = baseline.state_dict()
    with pytest.raises(error, match=field if value != 1e39 else "float32"):
        baseline.load_state_dict({**before, field: value})
    assert baseline.state_dict() == before


@scales
def test_floats_and_tensors_decide_alike_on_the_labelled_streams(scale: str) -> None:
    signal = "loss" if scale == "linear" else "norm"
    rows = [s.values[:400].tolist() for s in streams(seeds=(0, 1)) if s.signal == signal]
    stacked = torch.tensor(rows)
    together, seen = fresh(scale, warmup=20, patience=20), []
    for values in stacked.unbind(1):
        verdict = together.judge(values)
        gave_up = together.learn(verdict, when=torch.tensor(True))
        assert isinstance(verdict.score, torch.Tensor)
        seen.append(torch.stack([verdict.score > 6, torch.as_tensor(gave_up)]))
    on_device = torch.stack(seen, 2)
    for i, row in enumerate(stacked.tolist()):
        alone = scores(fresh(scale, warmup=20, patience=20), row)
        assert on_device[0, i].tolist() == [score > 6 for score, _ in alone]
        assert on_device[1, i].tolist() == [gave_up for _, gave_up in alone]
