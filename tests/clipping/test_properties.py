"""What holds for every gradient: no clipper makes it longer, turns it, or touches a small one."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import stablekit
from stablekit_clipping import AGC, AdaGC, AutoClip, GlobalNorm, QuantileClip, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.clipping.streams import initial_values, play, stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.clipping.streams import Array

GLOBAL: dict[str, Callable[[], Any]] = {
    "global-norm": lambda: GlobalNorm(0.5),
    "autoclip": lambda: AutoClip(30),
    "quantile-clip": lambda: QuantileClip(0.5, history=5),
    "zclip": lambda: ZClip(1.0, warmup_steps=3, max_grad_norm=0.9),
}
PER_TENSOR: dict[str, Callable[[], Any]] = {
    "quantile-clip, per tensor": lambda: QuantileClip(0.5, history=5, per_tensor=True),
    "adagc": lambda: AdaGC(warmup_steps=2),
    "adagc, clipped": lambda: AdaGC(warmup_steps=2, warmup_norms="clipped"),
}
CLIPPERS: dict[str, Callable[[], Any]] = {**GLOBAL, **PER_TENSOR, "agc": lambda: AGC(0.05)}

finite = st.floats(-100, 100, width=32, allow_subnormal=False)
awkward = st.sampled_from([0.0, 1.0, -2.5, math.nan, math.inf, -math.inf, 1e30])


def steps_of(
    elements: st.SearchStrategy[float], *, first_may_be_none: bool = True
) -> st.SearchStrategy[list[list[Array | None]]]:
    """Return streams of two to six steps of a matrix and a vector, either of them absent."""
    always = arrays(np.float32, (2, 2), elements=elements)
    matrix: st.SearchStrategy[Array | None] = st.none() | always if first_may_be_none else always
    vector = st.none() | arrays(np.float32, (2,), elements=elements)
    return st.lists(st.tuples(matrix, vector).map(list), min_size=2, max_size=6)


VALUES = [np.full((2, 2), 0.5, "f"), np.full(2, 0.25, "f")]


@pytest.mark.parametrize("name", CLIPPERS)
@given(steps=steps_of(finite), device_mode=st.booleans())
def test_no_clipper_makes_a_norm_larger(
    name: str, steps: list[list[Array | None]], device_mode: bool
) -> None:
    ours = play(CLIPPERS[name](), steps, values=VALUES, device_mode=device_mode)
    for before, after in zip(steps, ours.gradients, strict=True):
        for gradient, left in zip(before, after, strict=True):
            if gradient is not None:
                assert left is not None
                assert (np.abs(left) <= np.abs(gradient)).all()


@pytest.mark.parametrize("name", [*GLOBAL, *PER_TENSOR])
@given(steps=steps_of(finite))
def test_a_norm_clipper_keeps_the_direction(name: str, steps: list[list[Array | None]]) -> None:
    ours = play(CLIPPERS[name](), steps, values=VALUES)
    for before, after in zip(steps, ours.gradients, strict=True):
        pairs = [
            (g.ravel().astype(float), a.ravel().astype(float))
            for g, a in zip(before, after, strict=True)
            if g is not None and a is not None
        ]
        if name in GLOBAL and pairs:
            gradients, lefts = zip(*pairs, strict=True)
            pairs = [(np.concatenate(gradients), np.concatenate(lefts))]
        for g, a in pairs:
            along = g @ a / max(float(g @ g), 1e-300)
            np.testing.assert_allclose(a, along * g, rtol=1e-5, atol=1e-6 * np.abs(a).max())


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", CLIPPERS)
def test_below_its_threshold_a_clipper_changes_no_bit(name: str, device_mode: bool) -> None:
    quiet_ones: dict[str, Callable[[], Any]] = {
        **CLIPPERS,
        "global-norm": lambda: GlobalNorm(5.0),
        "zclip": lambda: ZClip(warmup_steps=3, max_grad_norm=5.0),
        "adagc": lambda: AdaGC(warmup_steps=2, lambda_abs=5.0),
        "agc": lambda: AGC(2.0),
    }
    plugin = quiet_ones[name]()
    # Falling scale: after the first steps every norm is below those before it.
    steps = [[g * np.float32(0.5**t) for g in s] for t, s in enumerate(stream(3, 30, []))]
    ours = play(plugin, steps, values=initial_values(3), device_mode=device_mode)
    quiet = [t for t, share in enumerate(ours.metric("clipped")) if share == 0]
    assert len(quiet) >= 15
    for t in quiet:
        for gradient, left in zip(steps[t], ours.gradients[t], strict=True):
            assert left is not None
            assert gradient.tobytes() == left.tobytes()


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), torch.optim.RMSprop],
    ids=["adamw", "fused adamw", "rmsprop"],
)
@given(steps=steps_of(st.one_of(finite, awkward)), device_mode=st.booleans())
def test_with_the_guard_everything_stays_finite(
    make: Callable[..., torch.optim.Optimizer],
    steps: list[list[Array | None]],
    device_mode: bool,
) -> None:
    params = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in VALUES]
    optimizer = make(params, lr=0.1)
    chain = [NonFiniteGuard(max_consecutive=100), *(factory() for factory in CLIPPERS.values())]
    for i, plugin in enumerate(chain):
        plugin.name = f"p{i}"
    session = stablekit.attach(optimizer, *chain, device_mode=device_mode)
    for step in steps:
        for param, gradient in zip(params, step, strict=True):
            param.grad = None if gradient is None else torch.from_numpy(gradient.copy())
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in params)
    assert all_finite(optimizer.state_dict()["state"])
    assert all_finite(session.state_dict()["plugins"])


def all_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(all_finite(item) for item in value)
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", CLIPPERS)
@given(steps=steps_of(finite, first_may_be_none=False), device_mode=st.booleans())
def test_a_restricted_clipper_touches_and_sees_no_other_tensor(
    name: str, steps: list[list[Array | None]], device_mode: bool
) -> None:
    alone = play(CLIPPERS[name](), [s[:1] for s in steps], values=VALUES[:1])
    plugin = CLIPPERS[name]()
    values = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in VALUES]
    optimizer = torch.optim.SGD([(f"t{i}", p) for i, p in enumerate(values)], lr=0.0)
    stablekit.attach(optimizer, stablekit.only(plugin, include="t0"), device_mode=device_mode)
    for t, step in enumerate(steps):
        for param, gradient in zip(values, step, strict=True):
            param.grad = None if gradient is None else torch.from_numpy(gradient.copy())
        optimizer.step()
        if step[1] is not None:
            assert values[1].grad is not None
            assert values[1].grad.numpy().tobytes() == step[1].tobytes()
        expected = alone.gradients[t][0]
        if expected is not None and step[0] is not None:
            assert values[0].grad is not None
            np.testing.assert_allclose(values[0].grad.numpy(), expected, rtol=1e-6)


def test_a_step_without_gradients_of_its_own_teaches_a_restricted_clipper_nothing() -> None:
    plugin = ZClip()
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([(f"t{i}", p) for i, p in enumerate(params)], lr=0.0)
    stablekit.attach(optimizer, stablekit.only(plugin, include="t0"))
    params[1].grad = torch.ones(2)
    optimizer.step()
    assert plugin.state_dict()["count"] == 0
