"""WindowMoments are those of a list of the last values, on the host and on a device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekit.statistics import WindowMoments

EVENTS = st.lists(
    st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans(), st.integers(0, 15)), max_size=60
)


def naive(values: list[float]) -> tuple[float, float]:
    row = torch.tensor(values, dtype=torch.float64)
    return row.mean().item(), (row.std().item() if len(values) > 1 else 0.0)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e35])
@given(events=EVENTS, window=st.integers(2, 9))
def test_moments_are_those_of_the_values_that_were_let_in(
    unit: float, on_device: bool, events: list[tuple[float, bool, int]], window: int
) -> None:
    ours = WindowMoments(window)
    last: list[float] = []
    for value, enters, forgets in events:
        number = torch.tensor(value) * unit
        ours.align(number if on_device else number.item())
        ours.clear(when=torch.tensor(forgets == 0) if on_device else forgets == 0)
        ours.push(
            number if on_device else number.item(),
            when=torch.tensor(enters) if on_device else enters,
        )
        last = [] if forgets == 0 else last
        last = [*last, number.item()][-window:] if enters else last
        assert ours.values().tolist() == last
        assert int(ours.count) == len(last)
        if last:
            mean, std = map(float, ours.moments())
            size = max(map(abs, last))
            assert (mean, std) == pytest.approx(naive(last), rel=1e-5, abs=1e-6 * size)


def test_without_values_moments_are_zero() -> None:
    ours = WindowMoments(4)
    assert ours.moments() == (0.0, 0.0)
    ours.align(torch.zeros(()))
    assert tuple(map(float, ours.moments())) == (0.0, 0.0)


def test_a_constant_has_no_deviation() -> None:
    for example in (0.0, torch.zeros(())):
        ours = WindowMoments(8)
        ours.align(example)
        for _ in range(20):
            ours.push(torch.tensor(0.1) if isinstance(example, torch.Tensor) else 0.1, when=True)
        mean, std = map(float, ours.moments())
        assert mean == pytest.approx(0.1)
        assert std < 1e-7


@pytest.mark.parametrize("count", [0, 3, 5, 12])
def test_values_go_from_the_host_to_a_device_and_back(count: int) -> None:
    ours = WindowMoments(5)
    for value in range(count):
        ours.push(float(value), when=True)
    before = ours.values()
    ours.align(torch.zeros(()))
    assert torch.equal(ours.values(), before)
    ours.push(torch.tensor(99.0), when=torch.tensor(True))
    ours.align(0.0)
    assert ours.values().tolist() == [*before.tolist(), 99.0][-5:]


def test_more_values_than_fit_leave_the_newest() -> None:
    ours = WindowMoments(3)
    ours.load(torch.arange(10.0))
    assert ours.values().tolist() == [7.0, 8.0, 9.0]


def test_on_a_device_nothing_is_read() -> None:
    # A tensor on the meta device has no value: reading it raises.
    ours = WindowMoments(5)
    value = torch.zeros((), device="meta")
    for _ in range(3):
        ours.align(value)
        ours.push(value, when=value > 0)
        ours.clear(when=value > 1)
        assert all(isinstance(moment, torch.Tensor) for moment in ours.moments())
