"""The quantile trackers agree with numpy on everything they have seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekit.statistics import GrowingQuantile, WindowQuantile, window_quantile

norms = st.one_of(st.just(0.0), st.floats(0, 1e6, width=32), st.sampled_from([1.0, 2.0, 2.0**-100]))
quantiles = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.floats(0, 1))
TRUE = torch.tensor(True)
CPU = torch.device("cpu")


def expected(values: list[float], quantile: float) -> float:
    """Return numpy's quantile; of the positive values alone where it would rest on zeros."""
    positive = [value for value in values if value > 0]
    if not positive:
        return math.inf
    rests_on_zeros = math.floor((len(values) - 1) * quantile) < len(values) - len(positive)
    return float(np.quantile(positive if rests_on_zeros else values, quantile))


@given(values=st.lists(norms, min_size=1, max_size=40), quantile=quantiles)
def test_growing_quantile_is_numpys_after_every_value(values: list[float], quantile: float) -> None:
    seen = GrowingQuantile(quantile)
    for i, value in enumerate(values):
        seen.push(value)
        assert seen.value() == pytest.approx(expected(values[: i + 1], quantile), rel=1e-9)


def test_growing_quantile_is_numpys_on_a_long_stream() -> None:
    rng = np.random.default_rng(4)
    values = rng.lognormal(size=5000).astype(np.float32)
    values[rng.random(5000) < 0.05] = 0
    for percentile in (1, 10, 50, 99):
        seen = GrowingQuantile(percentile / 100)
        for i, value in enumerate(values.tolist()):
            seen.push(value)
            ours = seen.value()
            if i % 500 == 499:
                head = values[: i + 1].tolist()
                assert ours == pytest.approx(expected(head, percentile / 100), rel=1e-9)


def test_growing_quantile_moves_few_values_a_step_however_many_it_holds() -> None:
    rng = np.random.default_rng(5)
    seen = GrowingQuantile(0.1)
    moved = []
    for value in rng.lognormal(size=4000).tolist():
        before = len(seen._low)
        seen.push(value)
        seen.value()
        moved.append(abs(len(seen._low) - before))
    assert max(moved) <= 2


@given(values=st.lists(norms, max_size=30), quantile=quantiles)
def test_growing_quantile_is_saved_in_order_and_goes_on_the_same(
    values: list[float], quantile: float
) -> None:
    seen, resumed = GrowingQuantile(quantile), GrowingQuantile(quantile)
    for value in values:
        seen.push(value)
    assert seen.values().tolist() == pytest.approx(values)
    resumed.load(seen.values())
    for quantile_of in (seen, resumed):
        quantile_of.push(3.0)
    assert resumed.value() == seen.value()
    assert torch.equal(resumed.values(), seen.values())


@given(
    values=st.lists(norms, min_size=1, max_size=40), quantile=quantiles, history=st.integers(1, 9)
)
def test_window_quantile_is_numpys_of_the_last_values(
    values: list[float], quantile: float, history: int
) -> None:
    window = WindowQuantile(quantile, history=history)
    assert window.value(("a",), CPU).tolist() == [math.inf]
    for i, value in enumerate(values):
        window.push(("a",), torch.tensor([value]), when=TRUE)
        last = values[max(0, i + 1 - history) : i + 1]
        ours = window.value(("a",), CPU).item()
        # Its place in the window is float32: where that rounds up, it is a place away from zeros.
        place = (len(last) - 1) * quantile
        if abs(place - round(place)) > 1e-4 or place == round(place):
            assert ours == pytest.approx(expected(last, quantile), rel=1e-4, abs=1e-30)


@given(
    values=st.lists(norms, min_size=1, max_size=30),
    history=st.integers(1, 7),
    rest=st.lists(norms, min_size=1, max_size=12),
)
def test_window_quantile_goes_on_the_same_after_a_checkpoint(
    values: list[float], history: int, rest: list[float]
) -> None:
    window = WindowQuantile(0.5, history=history)
    for value in values:
        window.push(
            ("a", "b"), torch.tensor([value, value / 2]), when=torch.tensor([True, value > 1])
        )
    resumed = WindowQuantile(0.5, history=history)
    state = window.state_dict()
    assert state["a"].tolist() == pytest.approx(values[-history:])
    resumed.load_state_dict(state, field="histories")
    for value in rest:
        for each in (window, resumed):
            each.push(("b", "a"), torch.tensor([value, value]), when=TRUE)
        assert torch.equal(window.value(("a", "b"), CPU), resumed.value(("a", "b"), CPU))
    ours, theirs = window.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_window_counts_do_not_grow_with_the_run() -> None:
    window = WindowQuantile(0.5, history=3)
    for value in range(1, 100):
        window.push(("a",), torch.tensor([float(value)]), when=TRUE)
        assert window._counts.rows()["a"] < 6
    assert window.state_dict()["a"].tolist() == [97.0, 98.0, 99.0]


def test_a_window_grows_without_losing_a_value_or_reading_one() -> None:
    window = WindowQuantile(0.5, history=2)
    for value in (1.0, 2.0):
        window.push(("a",), torch.tensor([value]), when=TRUE)
    window.grow(5)
    for value in (3.0, 4.0, 5.0):
        window.push(("a",), torch.tensor([value]), when=TRUE)
    assert window.state_dict()["a"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    meta = torch.device("meta")
    hidden = WindowQuantile(0.5, history=2)
    hidden.push(
        ("a",), torch.ones(1, device=meta), when=torch.ones((), dtype=torch.bool, device=meta)
    )
    hidden.grow(4)
    assert hidden.value(("a",), meta).device == meta


def test_rows_are_told_apart() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, math.inf], [math.inf] * 3])
    counts = torch.tensor([3.0, 2.0, 0.0])
    assert window_quantile(values, counts, 0.5).tolist() == [2.0, 5.0, math.inf]
