"""WeightClip says before it clamps that the limit is not one for these weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import StablekitWarning
from stablekit_updates import WeightClip

MODES = [{}, {"device_mode": True, "log_every": 2}]
modes = pytest.mark.parametrize("options", MODES, ids=["host", "device"])


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "small.weight": nn.Parameter(torch.randn(20, 30, generator=generator) * 0.01),
        "usual.weight": nn.Parameter(torch.randn(20, 30, generator=generator) * 0.5),
        "norm.weight": nn.Parameter(torch.ones(30)),
    }


def run(
    plugin: object, params: dict[str, nn.Parameter], steps: int, **options: object
) -> list[str]:
    """Return the warnings of so many steps that move nothing."""
    optimizer = torch.optim.SGD(list(params.items()), lr=0.0, fused=True)
    stablekit.attach(optimizer, plugin, **options)  # type: ignore[arg-type]  # options of attach
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            for param in params.values():
                param.grad = torch.zeros_like(param)
            optimizer.step()
    assert all(one.category is StablekitWarning for one in told)
    return [str(one.message) for one in told]


@modes
def test_a_limit_below_most_weights_is_told_once_with_the_numbers(
    options: dict[str, object],
) -> None:
    params = weights()
    median = params["usual.weight"].detach().abs().median().item()
    (message,) = run(WeightClip(), params, 4, **options)
    assert message.startswith("weight-clip clamps to 0.01, but in 1 of 2 tensors most weights are")
    assert f"the median |w| of usual.weight is {median:.3g}" in message


@modes
def test_a_limit_above_most_weights_is_taken_as_meant(options: dict[str, object]) -> None:
    assert run(WeightClip(0.5), weights(), 3, **options) == []


def test_only_tensors_that_are_clamped_are_looked_at() -> None:
    assert run(stablekit.only(WeightClip(0.05), include="small.*"), weights(), 1) == []
    (message,) = run(stablekit.only(WeightClip(0.05), include="norm.*"), weights(), 1)
    assert "the median |w| of norm.weight is 1." in message


def test_a_resumed_run_whose_weights_are_within_hears_nothing() -> None:
    first, second = weights(), weights()
    run(WeightClip(), first, 1)
    optimizer = torch.optim.SGD(list(second.items()), lr=0.0)
    stablekit.attach(optimizer, WeightClip())
    for name, param in second.items():
        param.data.copy_(first[name].data)  # as a checkpoint loaded after attach() does
        param.grad = torch.zeros_like(param)
    optimizer.step()


def test_large_tensors_are_sampled() -> None:
    large = nn.Parameter(torch.full((700, 700), 0.25))
    (message,) = run(WeightClip(0.1), {"w": large}, 1)
    assert "the median |w| of w is 0.25." in message
