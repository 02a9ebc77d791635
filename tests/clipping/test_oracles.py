"""Every clipper agrees with a plain float64 loop on other seeds and spike schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stablekit_clipping import AGC, AdaGC, AutoClip, QuantileClip, ZClip
from tests.clipping import oracles
from tests.clipping.streams import initial_values, play, stream, tensor_norms

if TYPE_CHECKING:
    from tests.clipping.streams import Array, Norms

STEPS = 160
SCHEDULES: dict[str, tuple[int, list[tuple[int, float, Any]]]] = {
    "spikes in the warm-up": (
        11,
        [(3, 40.0, "all"), (12, 5.0, [1]), (24, 30.0, [0]), (25, 8.0, "all"), (26, 100.0, "all")],
    ),
    "clustered spikes": (23, [(t, 4.0 + t % 7, "all") for t in range(70, 90)]),
    "zeros in and after the warm-up": (
        101,
        [
            (10, 0.0, "all"),
            (11, 0.0, "all"),
            (60, 0.0, "all"),
            (90, 0.0, [2]),
            *((t, 0.0, "all") for t in range(120, 124)),
            (124, 60.0, "all"),
            (130, 0.0, [0, 1]),
        ],
    ),
    "tensors apart": (
        5,
        [(40, 1e3, [0]), (41, 1e-3, [1]), (60, 0.0, [1]), (62, 20.0, [2]), (90, 1e5, [1, 2])],
    ),
    "falling and rising scale": (
        77,
        [(t, 0.9 ** (t - 50), "all") for t in range(50, 80)]
        + [(t, 0.04 * 1.1 ** (t - 80), "all") for t in range(80, 120)],
    ),
}

both_modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def gradients_of(schedule: str) -> list[list[Array]]:
    seed, spikes = SCHEDULES[schedule]
    return list(stream(seed, STEPS, spikes))


def same(ours: Norms, theirs: Norms) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def norms_of(gradients: list[list[Array]]) -> Norms:
    return np.array([tensor_norms(step) for step in gradients])


@schedules
@pytest.mark.parametrize("history", [None, 1000])
def test_autoclip_is_the_percentile_of_all_norms_so_far(schedule: str, history: int | None) -> None:
    gradients = gradients_of(schedule)
    ours = play(AutoClip(30, history=history), gradients)
    same(ours.norms, oracles.autoclip(norms_of(gradients), 30))


@schedules
def test_quantile_clip_looks_at_the_norms_before(schedule: str) -> None:
    gradients = gradients_of(schedule)
    ours = play(QuantileClip(0.7, history=25), gradients)
    same(ours.norms, oracles.quantile_clip(norms_of(gradients), 0.7, 25))


@schedules
def test_quantile_clip_per_tensor_is_one_clipper_a_tensor(schedule: str) -> None:
    gradients = gradients_of(schedule)
    plugin = QuantileClip(0.9, history=40, per_tensor=True)
    ours = play(plugin, gradients)
    same(ours.norms, oracles.quantile_clip_per_tensor(norms_of(gradients), 0.9, 40))


@schedules
@pytest.mark.parametrize(
    "config",
    [
        {"max_grad_norm": None},
        {"max_grad_norm": 0.8, "warmup_steps": 12, "alpha": 0.9},
        {"max_grad_norm": None, "clip_option": "mean", "z_thresh": 1.5},
        {"max_grad_norm": None, "mode": "percentile", "warmup_steps": 2},
        {"max_grad_norm": None, "clip_factor": 0.6, "skip_update_on_spike": True, "eps": 0.01},
    ],
    ids=["adaptive", "constant limit too", "mean", "percentile", "factor"],
)
def test_zclip_is_its_loop(schedule: str, config: dict[str, Any]) -> None:
    gradients = gradients_of(schedule)
    ours = play(ZClip(**config), gradients)
    loop = oracles.ZClipLoop(**config)
    before = np.linalg.norm(norms_of(gradients), axis=1)
    after, means, variances = [], [], []
    for n in before:
        after.append(loop.after(n))
        means.append(loop.mean)
        variances.append(loop.var)
    same(ours.totals, np.array(after))
    same(np.array([state["mean"] for state in ours.states]), np.array(means))
    same(np.array([state["var"] for state in ours.states]), np.array(variances))


@schedules
@pytest.mark.parametrize(("lambda_rel", "beta", "warmup"), [(1.04, 0.99, 100), (1.2, 0.9, 30)])
@pytest.mark.parametrize("warmup_norms", ["raw", "clipped"])
def test_adagc_is_its_loop(
    schedule: str,
    lambda_rel: float,
    beta: float,
    warmup: int,
    warmup_norms: str,
) -> None:
    gradients = gradients_of(schedule)
    plugin = AdaGC(lambda_rel, beta=beta, warmup_steps=warmup, warmup_norms=warmup_norms)
    ours = play(plugin, gradients)
    loop = oracles.AdaGCLoop(lambda_rel, beta, warmup, paper=warmup_norms == "clipped")
    for t, norms in enumerate(norms_of(gradients)):
        same(ours.norms[t], loop.after(norms))
        gammas = ours.states[t]["gamma"]
        same(np.array([gammas[f"t{i}"] for i in loop.gamma]), np.array(list(loop.gamma.values())))


@both_modes
@pytest.mark.parametrize("clipping", [0.01, 0.16])
def test_agc_clips_unit_by_unit(clipping: float, device_mode: bool) -> None:
    values = initial_values(3)
    values[0][2] = 0.0  # a unit that starts at zero
    gradients = gradients_of("tensors apart")[55:65]
    ours = play(AGC(clipping), gradients, values=values, device_mode=device_mode)
    for before, after in zip(gradients, ours.gradients, strict=True):
        for gradient, weight, left in zip(before, values, after, strict=True):
            assert left is not None
            expected = oracles.agc(gradient, weight, clipping, 1e-3)
            np.testing.assert_allclose(left, expected, rtol=1e-5, atol=1e-12)


@schedules
@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoClip(20),
        lambda: QuantileClip(0.8, per_tensor=True, history=30),
        lambda: ZClip(max_grad_norm=None),
        lambda: ZClip(0.9, mode="percentile", skip_update_on_spike=True),
        lambda: AdaGC(warmup_steps=40),
        lambda: AdaGC(1.1, beta=0.95, warmup_steps=20, warmup_norms="clipped"),
        lambda: AGC(0.02),
    ],
    ids=["autoclip", "quantile-clip", "zclip", "zclip percentile", "adagc", "adagc clipped", "agc"],
)
def test_device_mode_decides_as_host_mode_does(schedule: str, make: Any) -> None:  # noqa: ANN401 - a factory
    gradients = gradients_of(schedule)
    values = initial_values(1)
    host = play(make(), gradients, values=values)
    device = play(make(), gradients, values=values, device_mode=True)
    np.testing.assert_allclose(device.norms, host.norms, rtol=1e-6)
    np.testing.assert_array_equal(device.metric("clipped"), host.metric("clipped"))
