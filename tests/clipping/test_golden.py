"""Every clipper does what its reference implementation did, in both modes, to 1e-5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from stablekit_clipping import AGC, AdaGC, AutoClip, GlobalNorm, QuantileClip, ZClip
from tests.clipping.streams import golden, initial_values, numbers, play, sha256, stream

if TYPE_CHECKING:
    from tests.clipping.streams import Array, Norms, Played

STREAM = golden("stream")
SAMPLES = [step - 1 for step in STREAM["sample_steps"]]
BEFORE = numbers(STREAM["tensor_before"]).T

both_modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])


def public_stream() -> list[list[Array]]:
    return list(stream(STREAM["seed"], STREAM["n_steps"], STREAM["spikes"]))


def played(plugin: object, device_mode: bool) -> Played:
    values = initial_values(STREAM["seed"])
    return play(plugin, public_stream(), device_mode=device_mode, values=values)


def same(ours: Norms, theirs: object) -> None:
    expected = numbers(theirs)
    known = ~np.isnan(expected)
    np.testing.assert_allclose(ours[known], expected[known], rtol=1e-5, atol=1e-12)


def traces(name: str) -> pytest.MarkDecorator:
    """Run a test for every configuration of a golden file."""
    content = golden(name)["traces"]
    return pytest.mark.parametrize("trace", content.values(), ids=content.keys())


def adagc_traces(name: str) -> pytest.MarkDecorator:
    content = golden("adagc")["traces"][name]
    return pytest.mark.parametrize("trace", content.values(), ids=content.keys())


def test_stream_is_the_one_the_references_saw() -> None:
    gradients = public_stream()
    assert sha256(g for step in gradients for g in step) == STREAM["sha256_grads"]
    assert sha256(initial_values(STREAM["seed"])) == STREAM["sha256_params"]


@both_modes
@pytest.mark.parametrize(("max_norm", "norm_type"), [(1.0, 2.0), (0.1, 2.0), (0.05, float("inf"))])
def test_global_norm_is_torchs_clip_grad_norm(
    max_norm: float, norm_type: float, device_mode: bool
) -> None:
    ours = played(GlobalNorm(max_norm, norm_type=norm_type), device_mode)
    for step, left in zip(public_stream(), ours.gradients, strict=True):
        params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in step]
        for param, gradient in zip(params, step, strict=True):
            param.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        for param, gradient_left in zip(params, left, strict=True):
            assert param.grad is not None
            assert gradient_left is not None
            np.testing.assert_allclose(gradient_left, param.grad.numpy(), rtol=1e-5)


@both_modes
@pytest.mark.parametrize("history", [None, 300], ids=["unbounded", "bounded"])
@traces("autoclip")
def test_autoclip_is_pseeth_autoclip(
    trace: dict[str, Any], history: int | None, device_mode: bool
) -> None:
    ours = played(AutoClip(trace["config"]["clip_percentile"], history=history), device_mode)
    same(ours.totals, trace["total_after"])
    same(ours.metric("threshold"), trace["threshold"])
    same(ours.norms[SAMPLES], trace["tensor_after_at_sample_steps"])


@both_modes
@traces("quantile_clip")
def test_quantile_clip_is_the_one_of_the_package_autoclip(
    trace: dict[str, Any], device_mode: bool
) -> None:
    config = trace["config"]
    per_tensor = not config.get("global_threshold", False)
    plugin = QuantileClip(
        config["quantile"], history=config["history_length"], per_tensor=per_tensor
    )
    ours = played(plugin, device_mode)
    same(ours.norms[SAMPLES], trace["tensor_after_at_sample_steps"])
    if per_tensor:
        thresholds = numbers(trace["threshold_at_sample_steps"])
        same(ours.metric("threshold")[SAMPLES], np.sqrt((thresholds**2).sum(axis=1)))
    else:
        same(ours.totals, trace["total_after"])
        same(ours.metric("threshold"), trace["threshold"])


@both_modes
@traces("zclip")
def test_zclip_is_the_package_zclip(trace: dict[str, Any], device_mode: bool) -> None:
    config = trace["config"]
    ours = played(ZClip(**config), device_mode)
    same(ours.totals, trace["total_after"])
    if "tensor_after_at_sample_steps" in trace:
        same(ours.norms[SAMPLES], trace["tensor_after_at_sample_steps"])
    for key in ("mean", "var"):
        values = numbers([state[key] for state in ours.states])
        if f"{key}_after_step" in trace:
            same(values, trace[f"{key}_after_step"])
        else:
            same(values[SAMPLES], trace[f"{key}_after_at_sample_steps"])


@both_modes
@traces("zclip")
def test_zclip_clips_in_exactly_the_steps_in_which_the_package_does(
    trace: dict[str, Any], device_mode: bool
) -> None:
    # Without the constant limit; it does not enter the statistics, so the decisions are the same.
    ours = played(ZClip(**{**trace["config"], "max_grad_norm": None}), device_mode)
    expected = {int(step): value for step, value in trace["clip_val_by_step"].items()}
    assert ours.acted() == list(expected)
    same(ours.totals[[step - 1 for step in expected]], list(expected.values()))


@both_modes
@adagc_traces("paddle_reference")
def test_adagc_with_raw_norms_is_the_authors_paddle_code(
    trace: dict[str, Any], device_mode: bool
) -> None:
    config = trace["config"]
    plugin = AdaGC(
        config["clip_ratio"], beta=config["beta"], warmup_steps=config["start_clip_steps"]
    )
    ours = played(plugin, device_mode)
    same(ours.norms[SAMPLES], trace["tensor_after_at_sample_steps"])
    if "total_after" in trace:
        same(ours.totals, trace["total_after"])
    same_gammas(ours, trace)
    is_clipped = ours.norms < BEFORE * (1 - 5e-5)
    after_warmup = is_clipped[config["start_clip_steps"] + 1 :]
    assert after_warmup.sum(axis=0).tolist() == trace["final_clip_times"]


@both_modes
@adagc_traces("PAPER_ONLY")
def test_adagc_with_clipped_norms_is_the_papers_algorithm(
    trace: dict[str, Any], device_mode: bool
) -> None:
    config = trace["config"]
    plugin = AdaGC(
        config["lambda_rel"],
        beta=config["beta"],
        lambda_abs=config["lambda_abs"],
        warmup_steps=config["T_start"],
        warmup_norms="clipped",
    )
    ours = played(plugin, device_mode)
    same(ours.norms[SAMPLES], trace["tensor_after_at_sample_steps"])
    if "total_after" in trace:
        same(ours.totals, trace["total_after"])
    same_gammas(ours, trace)


def same_gammas(ours: Played, trace: dict[str, Any]) -> None:
    gammas = numbers([[state["gamma"][f"t{i}"] for i in range(3)] for state in ours.states])
    if "gamma_after_step" in trace:
        same(gammas.T, trace["gamma_after_step"])
    else:
        same(gammas[SAMPLES], trace["gamma_after_at_sample_steps"])


@both_modes
@traces("agc")
def test_agc_is_timms(trace: dict[str, Any], device_mode: bool) -> None:
    config = trace["config"]
    ours = played(AGC(config["clip_factor"], eps=config["eps"]), device_mode)
    for row in trace["rows"]:
        step = row["step"] - 1
        same(ours.totals[step], row["total"])
        same(ours.norms[step], row["tensor"])
        for tensor in (0, 2):
            gradient = ours.gradients[step][tensor]
            assert gradient is not None
            units = np.linalg.norm(gradient.reshape(len(gradient), -1).astype(np.float64), axis=1)
            same(units, row[f"unit{tensor}"])
