"""SPAM clips elements and lowers the learning rate as the authors' optimizer does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import AttachError
from stablekit_clipping import SPAM
from stablekit_clipping.spam import clip_to_moment_
from tests.clipping.streams import golden, initial_values, numbers, stream

STREAM = golden("stream")
SAMPLES = [step - 1 for step in STREAM["sample_steps"]]
TRACES = golden("spam")["traces"]
MODES = {"host": False, "device": True}


def public_stream(steps: int = STREAM["n_steps"]) -> list[list[Any]]:
    return list(stream(STREAM["seed"], STREAM["n_steps"], STREAM["spikes"]))[:steps]


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if key not in ("lr", "weight_decay")}
    return {"reset_interval" if key == "DeltaT" else key: value for key, value in rest.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_clipped_gradients_and_learning_rates_are_the_authors(
    trace: dict[str, Any], mode: str, fused: bool
) -> None:
    values = initial_values(STREAM["seed"])
    params = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    optimizer = torch.optim.AdamW(params, lr=trace["config"]["lr"], eps=1e-6, fused=fused)
    session = stablekit.attach(
        optimizer, SPAM(**arguments(trace["config"])), device_mode=MODES[mode]
    )
    norms, factors = [], []
    for gradients in public_stream():
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        norms.append([float(p.grad.double().norm()) for p in params if p.grad is not None])
        factors.append(session.metrics()["spam/lr_factor"])
        assert optimizer.param_groups[0]["lr"] == trace["config"]["lr"]
    expected = numbers(trace["clipped_tensor_norm_at_sample_steps"])
    np.testing.assert_allclose(np.array(norms)[SAMPLES], expected, rtol=1e-5)
    if "lr_scale_at_sample_steps" in trace:
        scales = trace["lr_scale_at_sample_steps"]
        np.testing.assert_allclose(np.array(factors)[SAMPLES], scales, rtol=1e-6)


def test_long_tensors_are_clipped_as_short_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(300_001, generator=generator)
    moment = torch.rand(300_001, generator=generator) * 0.3
    limit = (4.0 * moment).sqrt()
    expected = torch.where(gradient.abs() > limit, gradient.sign() * limit, gradient)
    clip_to_moment_(gradient, moment, 4.0)
    torch.testing.assert_close(gradient, expected)


def test_what_is_not_contiguous_is_clipped_too() -> None:
    gradient = torch.full((3, 2), 9.0).t()
    clip_to_moment_(gradient, torch.ones(2, 3), 4.0)
    assert gradient.tolist() == [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]


def test_a_coordinate_that_had_no_gradient_can_start_to_learn() -> None:
    published = golden("edge_cases")["spam"]["coordinate_with_zero_grad_for_30_steps_then_1"]
    assert published["value_after_60_steps"] == 0.0
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([param], lr=0.1)
    stablekit.attach(optimizer, SPAM(reset_interval=100))
    for step in range(60):
        param.grad = torch.tensor([1.0, 0.0 if step < 30 else 1.0])
        optimizer.step()
    assert param[1] < -0.5


def test_an_interval_of_zero_never_resets() -> None:
    assert golden("edge_cases")["spam"]["DeltaT_0"] == "ZeroDivisionError"
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([param])
    session = stablekit.attach(optimizer, SPAM(4.0, reset_interval=0, grad_accu_steps=3))
    for value in (1.0, 1.0, 100.0):
        param.grad = torch.full((2,), value)
        optimizer.step()
    assert session.metrics()["spam/clipped"] == 1.0
    assert session.events == []


def test_moments_are_cleared_before_the_update_and_the_step_count_stays() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([param])
    stablekit.attach(optimizer, SPAM(reset_interval=3, grad_accu_steps=2))
    for _ in range(3):
        param.grad = torch.full((1,), 2.0)
        optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"].item() == pytest.approx(0.1 * 2.0)
    assert state["exp_avg_sq"].item() == pytest.approx(0.001 * 4.0)
    assert state["step"].item() == 3


def test_an_optimizer_without_second_moment_is_refused_unless_nothing_is_clipped() -> None:
    def sgd() -> torch.optim.SGD:
        param = nn.Parameter(torch.zeros(2))
        param.grad = torch.ones(2)
        return torch.optim.SGD([param], lr=0.1, momentum=0.9)

    refused = stablekit.wrap(sgd(), SPAM())
    with pytest.raises(AttachError, match="give threshold=0"):
        refused.step()
    optimizer = stablekit.wrap(sgd(), SPAM(0, reset_interval=2, warmup_steps=4))
    for _ in range(2):
        optimizer.step()
    metrics = stablekit.session(optimizer).metrics()
    assert metrics["spam/lr_factor"] == pytest.approx(0.01)


@pytest.mark.parametrize("at", range(1, 24))
def test_resume_at_any_step_is_bit_identical(at: int) -> None:
    def new() -> tuple[list[nn.Parameter], torch.optim.AdamW]:
        params = [nn.Parameter(torch.from_numpy(v.copy())) for v in initial_values(STREAM["seed"])]
        optimizer = torch.optim.AdamW(params, lr=0.01)
        plugin = SPAM(50.0, reset_interval=9, warmup_steps=5, grad_accu_steps=2)
        stablekit.attach(optimizer, plugin)
        return params, optimizer

    def go(
        params: list[nn.Parameter], optimizer: torch.optim.AdamW, steps: list[list[Any]]
    ) -> list[list[float]]:
        seen = []
        for gradients in steps:
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = torch.from_numpy(gradient.copy())
            optimizer.step()
            seen.append([float(param.detach().double().sum()) for param in params])
        return seen

    gradients = public_stream(24)
    whole = go(*new(), gradients)
    first = new()
    go(*first, gradients[:at])
    second = new()
    for param, saved in zip(second[0], first[0], strict=True):
        param.data.copy_(saved.data)
    second[1].load_state_dict(first[1].state_dict())
    assert go(*second, gradients[at:]) == whole[at:]


def test_nan_stays_for_the_guard_and_infinity_is_lowered() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([param])
    stablekit.attach(optimizer, SPAM(4.0, grad_accu_steps=2))
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    param.grad = torch.tensor([math.nan, math.inf, -math.inf])
    optimizer.step()
    assert param.grad[0].isnan()
    assert param.grad[1:].isfinite().all()
    assert param.grad[1] == -param.grad[2]


def test_resets_so_frequent_that_nothing_would_be_clipped_are_refused() -> None:
    with pytest.raises(ValueError, match="reset_interval must be above grad_accu_steps=20"):
        SPAM(reset_interval=20)
