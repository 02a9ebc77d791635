"""Where the references break on bad input the clippers go on: NaN, Inf, overflow, zero, None."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from stablekit_clipping import AGC, AdaGC, AutoClip, ClipValue, GlobalNorm, QuantileClip, ZClip
from tests.clipping.streams import filled, golden, play

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.clipping.streams import Array

    Gradients = list[list[Array | None]]

EDGE = golden("edge_cases")
SIZES = (12, 3)
LEARNING: dict[str, Callable[[], Any]] = {
    "autoclip": lambda: AutoClip(50),
    "autoclip, bounded": lambda: AutoClip(50, history=6),
    "quantile-clip": lambda: QuantileClip(0.9, history=6),
    "quantile-clip, per tensor": lambda: QuantileClip(0.9, history=6, per_tensor=True),
    "zclip": lambda: ZClip(max_grad_norm=None, warmup_steps=5),
    "zclip, percentile": lambda: ZClip(max_grad_norm=1.0, warmup_steps=5, mode="percentile"),
    "zclip, skipping": lambda: ZClip(1.0, warmup_steps=5, skip_update_on_spike=True),
    "adagc": lambda: AdaGC(warmup_steps=5),
    "adagc, clipped": lambda: AdaGC(warmup_steps=5, warmup_norms="clipped"),
}
BAD = {"nan": math.nan, "inf": math.inf, "overflow": 1e30}

learning = pytest.mark.parametrize("name", LEARNING)
both_modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])


def noisy(steps: int) -> Gradients:
    """Return gradients whose norms vary by a tenth."""
    return filled([1 + 0.05 * (7 * t % 5) for t in range(1, steps + 1)], SIZES)


def spoiled(step: list[Array | None], bad: float) -> list[Array | None]:
    """Return a step with the bad value in the first element of every tensor."""
    copies = [None if g is None else g.copy() for g in step]
    for gradient in copies:
        if gradient is not None:
            gradient.flat[0] = bad
    return copies


def same_state(left: object, right: object) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_state(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return left == right


@both_modes
@pytest.mark.parametrize("at", [0, 4, 11], ids=["first", "warm-up", "later"])
@pytest.mark.parametrize("bad", BAD)
@learning
def test_statistics_are_as_if_the_bad_step_had_not_been(
    name: str, bad: str, at: int, device_mode: bool
) -> None:
    clean = noisy(16)
    dirty = [*clean[:at], spoiled(clean[at], BAD[bad]), *clean[at:]]
    ours = play(LEARNING[name](), dirty, device_mode=device_mode)
    expected = play(LEARNING[name](), clean, device_mode=device_mode)
    assert same_state(ours.states[-1], expected.states[-1])
    np.testing.assert_array_equal(ours.norms[at + 1 :], expected.norms[at:])


@pytest.mark.parametrize("bad", BAD)
@learning
def test_one_bad_tensor_keeps_a_global_statistic_as_it_was(name: str, bad: str) -> None:
    clean = noisy(12)
    step = [spoiled(clean[8], BAD[bad])[0], clean[8][1]]
    ours = play(LEARNING[name](), [*clean[:8], step])
    if "per tensor" not in name:
        assert same_state(ours.states[-1], ours.states[-2])
    else:
        before, after = (state["histories"] for state in ours.states[-2:])
        assert torch.equal(before["t0"], after["t0"])
        assert not torch.equal(before["t1"], after["t1"])


@pytest.mark.parametrize("bad", [*BAD, "zero"])
@pytest.mark.parametrize("at", [2, 8])
@learning
def test_a_spike_after_a_bad_step_is_clipped(name: str, at: int, bad: str) -> None:
    stream = noisy(14)
    stream[at] = spoiled(stream[at], BAD[bad]) if bad in BAD else filled([0.0], SIZES)[0]
    stream[11] = filled([50.0], SIZES)[0]
    ours = play(LEARNING[name](), stream)
    assert ours.totals[11] < 1.5
    assert ours.totals[12] > 0.5


@pytest.mark.parametrize("name", ["nan", "inf", "element_1e30_norm_overflows_float32"])
def test_autoclip_goes_on_where_the_reference_does_not(name: str) -> None:
    good = [1.0, 1.1, 1.2, 1.4, 1.5, 1.6, 1.7]
    stream = filled([s * math.sqrt(15) for s in good], SIZES)
    value = {"nan": math.nan, "inf": math.inf}.get(name, 1e30)
    stream.insert(3, [np.ones(12, "f"), np.ones(3, "f")])
    first = stream[3][0]
    assert first is not None
    first[0] = value
    ours = play(AutoClip(10), stream)
    without = play(AutoClip(10), stream[:3] + stream[4:])
    np.testing.assert_array_equal(np.delete(ours.totals, 3), without.totals)
    reference = EDGE["autoclip_pseeth_p10"][name]
    np.testing.assert_allclose(ours.totals[:3], reference[:3], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "at"),
    [
        ("nan_at_3", math.nan, 3),
        ("inf_at_3", math.inf, 3),
        ("nan_at_7", math.nan, 7),
        ("inf_at_7", math.inf, 7),
        ("overflow_1e30_at_7", 1e30, 7),
    ],
)
def test_zclip_clips_the_spike_that_the_reference_lets_through(
    name: str, value: float, at: int
) -> None:
    stream = filled([(1 + 0.05 * (7 * t % 5)) * math.sqrt(15) for t in range(1, 13)], SIZES)
    stream[at - 1] = spoiled(stream[at - 1], value)
    later = at + 2 if at > 5 else at + 6  # one more step of warm-up without the bad one
    stream[later - 1] = filled([50 * math.sqrt(15)], SIZES)[0]
    ours = play(ZClip(max_grad_norm=None, warmup_steps=5), stream)
    assert ours.totals[later - 1] < 5
    state = ours.states[-1]
    assert math.isfinite(state["mean"])
    assert 0 < state["var"] < 1
    reference = EDGE["zclip"][name]["norm_after"][: at - 1]
    np.testing.assert_allclose(ours.totals[: at - 1], reference, rtol=2e-4)


def test_zclip_sees_the_norm_in_float32_whatever_the_first_parameter_is() -> None:
    ours = play(ZClip(), [[np.full(4, 6e4, "f").astype(np.float16), np.full(4, 3e4, "f")]])
    assert ours.states[-1]["mean"] == pytest.approx(2 * math.hypot(6e4, 3e4), rel=1e-3)


@both_modes
@pytest.mark.parametrize("steps", [1, 25, 30, 400])
def test_zclip_learns_nothing_lasting_from_a_run_of_zero_norms(
    steps: int, device_mode: bool
) -> None:
    for start in (0, 40):
        norms = [1.0, 1.1] * (start // 2) + [0.0] * steps + [1.0, 1.1] * 60
        ours = play(ZClip(max_grad_norm=None), filled(norms), device_mode=device_mode)
        np.testing.assert_allclose(ours.totals, norms, rtol=1e-5)


@pytest.mark.parametrize("zeros", [1, 3, 20, 33, 60])
@pytest.mark.parametrize("others", [1, 2, 9])
def test_zclip_lives_with_norms_that_are_zero_most_of_the_time(zeros: int, others: int) -> None:
    norms = ([0.0] * zeros + [1.0, 1.1] * others) * (600 // (zeros + 2 * others))
    ours = play(ZClip(max_grad_norm=None), filled(norms))
    before = np.array(norms)
    assert (ours.totals[before > 0] > 0.9).all()


def test_a_norm_whose_square_overflows_stays_out_of_zclips_statistics() -> None:
    ours = play(ZClip(warmup_steps=3), filled([1.0, 1e25, 1.1, 0.9]))
    assert ours.states[-1]["count"] == 3
    assert ours.states[-1]["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("make", [AutoClip, lambda: AutoClip(history=20), QuantileClip])
def test_zeros_do_not_pull_a_quantile_to_zero(make: Callable[[], Any]) -> None:
    norms = [1.0, 2.0, 3.0] + [0.0] * 50 + [2.0]
    ours = play(make(), filled(norms))
    assert ours.totals[-1] > 0.9
    assert (ours.metric("threshold") > 0).all()


@pytest.mark.parametrize("make", [AutoClip, QuantileClip])
def test_zeros_alone_leave_a_quantile_without_threshold(make: Callable[[], Any]) -> None:
    ours = play(make(), filled([0.0] * 5 + [7.0]))
    assert ours.totals[-1] == pytest.approx(7.0)


def two_tensors(first: list[float | None], second: float = 0.2) -> Gradients:
    """Return gradients of two tensors of four elements with these norms; None is no gradient."""
    other = np.full(4, second / 2, "f")
    return [[None if n is None else np.full(4, n / 2, "f"), other] for n in first]


ZEROS = np.zeros(4, "f")
warmup_kinds = pytest.mark.parametrize("warmup_norms", ["raw", "clipped"])


@both_modes
@warmup_kinds
@pytest.mark.parametrize("at", [1, 2, 3])
def test_adagc_does_not_freeze_a_tensor_whose_gradient_is_zero_in_the_warmup(
    at: int, warmup_norms: str, device_mode: bool
) -> None:
    norms: list[float | None] = [0.2] * 12
    norms[at - 1] = 0.0
    plugin = AdaGC(warmup_steps=3, warmup_norms=warmup_norms)
    ours = play(plugin, two_tensors(norms), device_mode=device_mode, values=[ZEROS, ZEROS])
    np.testing.assert_allclose(ours.norms[:, 0], np.array(norms, float), rtol=1e-6)
    assert ours.states[-1]["gamma"]["t0"] == pytest.approx(0.2, rel=0.02)


def test_adagc_after_the_warmup_follows_the_reference_in_a_zero() -> None:
    norms: list[float | None] = [0.2] * 12
    norms[6] = 0.0
    edge = EDGE["adagc_paddle"]["zero_after_warmup_B7"]
    plugin = AdaGC(1.03, beta=0.98, warmup_steps=3)
    ours = play(plugin, two_tensors(norms), values=[ZEROS, ZEROS])
    assert ours.states[-1]["gamma"]["t0"] == pytest.approx(edge["gamma0"], rel=1e-5)
    np.testing.assert_allclose(ours.norms[:, 0], edge["norm_after_tensor0"], rtol=1e-6)


@both_modes
@pytest.mark.parametrize(
    "norms",
    [
        [0.2] * 10 + [0.0] * 1000 + [0.2] * 10,
        [0.2] * 10 + [0.0, 0.2] * 400,
        [0.0] * 500 + [0.2] * 9,
    ],
    ids=["long pause", "every other step", "late start"],
)
def test_adagc_keeps_a_tensor_alive_that_is_zero_for_a_long_time(
    norms: list[float | None], device_mode: bool
) -> None:
    plugin = AdaGC(warmup_steps=5)
    ours = play(plugin, two_tensors(norms), device_mode=device_mode, values=[ZEROS, ZEROS])
    assert ours.norms[-1, 0] > 0.1
    assert ours.states[-1]["gamma"]["t1"] == pytest.approx(0.2, rel=1e-4)


@both_modes
@warmup_kinds
@pytest.mark.parametrize("late", [3, 30], ids=["in the warm-up", "after it"])
def test_adagc_starts_a_late_tensor_with_its_first_norm(
    late: int, warmup_norms: str, device_mode: bool
) -> None:
    norms = [None] * late + [0.5] * 10 + [50.0]
    plugin = AdaGC(warmup_steps=5, warmup_norms=warmup_norms)
    ours = play(plugin, two_tensors(norms), device_mode=device_mode, values=[ZEROS, ZEROS])
    assert "t0" not in ours.states[late - 1]["gamma"]
    np.testing.assert_allclose(ours.norms[late:-1, 0], 0.5, rtol=1e-5)
    assert ours.norms[-1, 0] == pytest.approx(0.52, rel=1e-3)


@pytest.mark.parametrize("name", ["adagc", "quantile-clip, per tensor"])
def test_a_frozen_tensor_is_remembered_until_it_is_unfrozen(name: str) -> None:
    norms = [0.2] * 10 + [None] * 20 + [0.2]
    ours = play(LEARNING[name](), two_tensors(norms), values=[ZEROS, ZEROS])
    key = "gamma" if name == "adagc" else "histories"
    frozen = [state[key]["t0"] for state in ours.states[9:30]]
    assert all(same_state(frozen[0], other) for other in frozen)


def test_tensors_of_one_quantile_clip_do_not_wait_for_each_other() -> None:
    norms = [None] * 5 + [0.0] + [0.5] * 10 + [50.0]
    plugin = QuantileClip(0.5, per_tensor=True)
    ours = play(plugin, two_tensors(norms, 0.3), values=[ZEROS, ZEROS])
    assert ours.norms[-1].tolist() == pytest.approx([0.5, 0.3], rel=1e-4)
    assert len(ours.states[-1]["histories"]["t0"]) == 12
    assert len(ours.states[-1]["histories"]["t1"]) == 17


@learning
def test_steps_without_any_gradient_teach_nothing(name: str) -> None:
    stream = noisy(6)
    ours = play(LEARNING[name](), [*stream, [None, None]])
    assert same_state(ours.states[-1], ours.states[-2])


ALL: dict[str, Callable[[], Any]] = {
    **LEARNING,
    "global-norm": GlobalNorm,
    "global-norm, inf": lambda: GlobalNorm(norm_type=math.inf),
    "clip-value": lambda: ClipValue(0.1),
    "agc": AGC,
}


@both_modes
@pytest.mark.parametrize("name", ALL)
def test_nan_and_missing_gradients_pass_through(name: str, device_mode: bool) -> None:
    nan = np.full(SIZES[0], math.nan, "f")
    ours = play(ALL[name](), [*noisy(7), [nan, None], [None, None]], device_mode=device_mode)
    left = ours.gradients[-2]
    assert left[0] is not None
    assert np.isnan(left[0]).all()
    assert ours.gradients[-1] == [None, None]
    for metrics in ours.metrics[-2:]:
        assert metrics.get(f"{ours.plugin.name}/factor", 1.0) == 1.0
        assert metrics[f"{ours.plugin.name}/clipped"] == 0


@both_modes
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("clip-value", "agc")])
def test_an_infinite_norm_is_scaled_to_zero_as_torch_does(name: str, device_mode: bool) -> None:
    step = [np.array([math.inf] + [1.0] * 11, "f"), np.ones(3, "f")]
    ours = play(ALL[name](), [*noisy(7), step], device_mode=device_mode)
    first, second = ours.gradients[-1]
    assert first is not None
    assert second is not None
    assert (first[1:] == 0).all()
    if "per tensor" not in name and "adagc" not in name:
        assert (second == 0).all()


@both_modes
def test_clip_value_clamps_beside_a_nan(device_mode: bool) -> None:
    step = [np.array([math.nan, 5.0, -math.inf, 0.01], "f")]
    ours = play(ClipValue(0.1), [step], device_mode=device_mode)
    np.testing.assert_array_equal(ours.gradients[0][0], np.array([math.nan, 0.1, -0.1, 0.01], "f"))


@both_modes
def test_agc_confines_a_bad_unit_to_itself(device_mode: bool) -> None:
    gradient = np.ones((4, 4), "f")
    gradient[0, 0], gradient[1, 0] = math.nan, math.inf
    weights = np.ones((4, 4), "f")
    weights[3] = 0
    (left,) = play(AGC(0.01), [[gradient]], values=[weights], device_mode=device_mode).gradients[0]
    assert left is not None
    np.testing.assert_array_equal(left[0], gradient[0])
    np.testing.assert_array_equal(left[1], np.array([math.nan, 0, 0, 0], "f"))
    assert np.linalg.norm(left[2]) == pytest.approx(0.02, rel=1e-5)
    assert np.linalg.norm(left[3]) == pytest.approx(EDGE["agc_timm"]["zero_weight_unit_norm_after"])
