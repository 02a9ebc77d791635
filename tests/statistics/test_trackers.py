"""Running moments and named values keep what they were given, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablekit import moments
from stablekit.statistics import NamedValues, RunningMoments, history_of, scalar_of

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@given(
    values=st.lists(st.floats(2.0**-6, 1e4, width=32), min_size=1, max_size=60),
    warmup=st.integers(1, 30),
    alpha=st.floats(0.01, 0.99),
)
def test_running_moments_are_numpys_and_then_exponential(
    values: list[float], warmup: int, alpha: float
) -> None:
    ours = RunningMoments(warmup=warmup, alpha=alpha)
    mean = var = 0.0
    for i, value in enumerate(values):
        ours.update(torch.tensor(value), when=TRUE)
        if i < warmup:
            mean, var = float(np.mean(values[: i + 1])), float(np.var(values[: i + 1]))
        else:
            mean = alpha * mean + (1 - alpha) * value
            var = alpha * var + (1 - alpha) * (value - mean) ** 2
        assert float(ours.mean) == pytest.approx(mean, rel=1e-4)
        assert float(ours.var) == pytest.approx(var, rel=1e-3, abs=1e-5 * mean**2)
        assert bool(ours.ready) == (i + 1 >= warmup)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("seen", [0, 1, 5])
def test_running_moments_stay_finite(value: float, seen: int) -> None:
    ours = RunningMoments(warmup=3, alpha=0.9)
    for i in range(seen):
        ours.update(torch.tensor(1.0 + i), when=TRUE)
    before = ours.state_dict()
    ours.update(torch.tensor(value), when=torch.tensor(value).isfinite())
    ours.update(torch.tensor(7.0), when=FALSE)
    if seen or not math.isfinite(value):
        assert ours.state_dict() == before
    ours.update(torch.tensor(2.0), when=TRUE)
    assert all(math.isfinite(number) for number in ours.state_dict().values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", -1),
        ("count", 1.5),
        ("mean", math.nan),
        ("mean", 1e300),
        ("var", -1e-9),
        ("var", "1"),
        ("var", None),
    ],
)
def test_running_moments_refuse_a_bad_field_and_keep_theirs(field: str, value: object) -> None:
    ours = RunningMoments(warmup=3, alpha=0.9)
    ours.update(torch.tensor(2.0), when=TRUE)
    before = ours.state_dict()
    with pytest.raises((TypeError, ValueError), match=field):
        ours.load_state_dict({**before, field: value})
    assert ours.state_dict() == before


def test_named_values_follow_parameters_that_come_and_go() -> None:
    values = NamedValues(default=0.0)
    values.align(("a", "b"), CPU)
    values.set(torch.tensor([1.0, 2.0]))
    assert values.align(("c", "b"), CPU).tolist() == [0.0, 2.0]
    values.set(torch.tensor([3.0, 4.0]))
    assert values.align((), CPU).shape == (0,)
    assert values.align(["b", "a", "c"], CPU).tolist() == [4.0, 1.0, 3.0]
    assert values.state_dict() == {"a": 1.0, "b": 4.0, "c": 3.0}


def test_named_values_are_saved_exactly() -> None:
    values, resumed = NamedValues(default=math.inf), NamedValues(default=math.inf)
    rows = torch.rand(50, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(50)))
    values.align(names, CPU)
    values.set(rows)
    resumed.load_state_dict(values.state_dict(), field="gamma")
    assert torch.equal(resumed.align(names, CPU), rows)


@pytest.mark.parametrize(
    "state", [None, [1.0], {"a": None}, {"a": math.nan}, {"a": -1.0}, {1: 1.0}]
)
def test_named_values_refuse_a_bad_state_by_name(state: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="gamma"):
        NamedValues(default=math.inf).load_state_dict(state, field="gamma")


@pytest.mark.parametrize(
    "values", [None, [1.0], "x", torch.tensor(1.0), torch.ones(2, 2), torch.tensor([math.inf])]
)
def test_a_saved_history_is_a_vector_of_finite_norms(values: object) -> None:
    with pytest.raises((TypeError, ValueError), match="history must be"):
        history_of("history", values)


def test_a_saved_number_is_a_finite_float32() -> None:
    assert scalar_of("mean", 0.1).item() == np.float32(0.1)
    with pytest.raises(ValueError, match="mean must be a finite float32 number"):
        scalar_of("mean", 1e300)


OPTIMIZERS: list[tuple[Any, dict[str, Any], bool, bool]] = [
    (torch.optim.AdamW, {}, True, True),
    (torch.optim.SGD, {"momentum": 0.9}, True, False),
    (torch.optim.SGD, {}, False, False),
    (torch.optim.RMSprop, {}, False, True),
    (torch.optim.Adagrad, {}, False, True),
    (torch.optim.NAdam, {}, True, True),
]


@pytest.mark.parametrize(("make", "options", "has_first", "has_second"), OPTIMIZERS)
def test_moments_are_found_by_their_names(
    make: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    has_first: bool,
    has_second: bool,
) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 2.0)
    optimizer = make([param], lr=0.1, **options)
    optimizer.step()
    state = optimizer.state[param]
    first, second = moments.first(state), moments.second(state)
    assert (first is not None) == has_first
    assert (second is not None) == has_second
    if second is not None:
        assert bool((second > 0).all())
