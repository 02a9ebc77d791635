"""Constraints on weights hold after every update, touch nothing else, and are idempotent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit_updates import LogitScaleClamp, MaxNorm, SpectralCap, WeightClip
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from collections.abc import Callable

# Most tests here are about weights that are far outside.
pytestmark = pytest.mark.filterwarnings("ignore:weight-clip clamps")

MODES = {"host": False, "device": True}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PROJECTIONS: dict[str, Callable[[], Any]] = {
    "weight-clip": lambda: WeightClip(0.5),
    "max-norm": lambda: MaxNorm(1.0),
    "spectral-cap": lambda: SpectralCap(1.0),
}

each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each = pytest.mark.parametrize("make", PROJECTIONS.values(), ids=PROJECTIONS.keys())
matrices = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(-100, 100, width=32),
)


def projected(plugin: Any, *tensors: Tensor, names: Any = None, mode: str = "host") -> list[Tensor]:  # noqa: ANN401 - any plugin form
    """Return tensors after an update that moves nothing."""
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    named = zip(names or [f"t{i}" for i in range(len(params))], params, strict=True)
    optimizer = torch.optim.SGD(list(named), lr=0.0)
    stablekit.attach(optimizer, plugin, device_mode=MODES[mode])
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return [param.detach() for param in params]


def measured(name: str, weights: Tensor) -> float:
    """Return what a projection bounds, by other means, in float64."""
    matrix = weights.double().flatten(1).numpy()
    if name == "weight-clip":
        return 2 * float(np.abs(matrix).max())
    if name == "max-norm":
        return float(np.sqrt((matrix**2).sum(axis=1)).max())
    return float(np.linalg.svd(matrix, compute_uv=False).max())


@each_mode
@each_dtype
@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_constraint_holds_after_the_update(name: str, dtype: torch.dtype, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (3 * torch.randn(7, 5, 2, generator=generator)).to(dtype)
    (after,) = projected(PROJECTIONS[name](), weights, mode=mode)
    slack = 1e-3 if name == "spectral-cap" else 0.0
    if name == "spectral-cap" and dtype.itemsize == 2:
        slack = 4 * torch.finfo(dtype).eps
    assert measured(name, weights) > 1.0
    assert 0.9 < measured(name, after) <= 1.0 + slack


@settings(deadline=None, max_examples=60)
@given(matrix=matrices, name=st.sampled_from(sorted(PROJECTIONS)))
def test_projections_bound_any_matrix_and_repeat_without_effect(
    matrix: npt.NDArray[np.float32], name: str
) -> None:
    weights = torch.from_numpy(matrix.copy())
    (once,) = projected(PROJECTIONS[name](), weights)
    (twice,) = projected(PROJECTIONS[name](), once)
    assert measured(name, once) <= 1.0 + (1e-4 if name == "spectral-cap" else 0.0)
    assert torch.equal(once, twice)
    if measured(name, weights) <= 0.999:
        assert torch.equal(once, weights)


@each_dtype
@each
def test_projections_are_idempotent_in_every_precision(
    make: Callable[[], Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = (2 * torch.randn(9, 9, generator=generator)).to(dtype)
    (once,) = projected(make(), weights)
    (twice,) = projected(make(), once)
    assert torch.equal(once, twice)


@each_mode
@each
def test_norms_and_biases_are_left_alone_unless_named(make: Callable[[], Any], mode: str) -> None:
    weight, bias = torch.full((2, 2), 9.0), torch.full((2,), 9.0)
    names = ("weight", "bias")
    assert torch.equal(projected(make(), weight, bias, names=names, mode=mode)[1], bias)
    plugin = make()
    if not isinstance(plugin, SpectralCap):  # a vector has no singular value but its norm
        named = stablekit.only(plugin, include="bias")
        left, clipped = projected(named, weight, bias, names=names, mode=mode)
        assert torch.equal(left, weight)
        assert float(clipped.abs().max()) < 1.0


@each
def test_optimizer_state_is_not_touched(make: Callable[[], Any]) -> None:
    states = []
    for plugins in ([], [make()]):
        param = nn.Parameter(torch.full((3, 3), 5.0))
        optimizer = torch.optim.AdamW([param], lr=0.0, weight_decay=0.0)
        stablekit.attach(optimizer, *plugins)
        param.grad = torch.arange(9.0).view(3, 3)
        optimizer.step()
        states.append(optimizer.state[param])
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("exp_avg", "exp_avg_sq"))


@each_mode
@each
def test_a_skipped_step_is_not_projected(make: Callable[[], Any], mode: str) -> None:
    class Never:
        name = "never"

        @stablekit.hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            step.skip("never", when=torch.tensor(True))

    param = nn.Parameter(torch.full((3, 3), 5.0))
    optimizer = torch.optim.AdamW([param], fused=True)
    stablekit.attach(optimizer, Never(), make(), device_mode=MODES[mode])
    param.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3, 3), 5.0))


def test_projections_act_in_the_listed_order() -> None:
    weights = torch.tensor([[3.0, 4.0]])
    first = [WeightClip(1.0), MaxNorm(1.0)]
    ends = []
    for plugins in (first, [MaxNorm(1.0), WeightClip(1.0)]):
        param = nn.Parameter(weights.clone())
        optimizer = torch.optim.SGD([param], lr=0.0)
        stablekit.attach(optimizer, *plugins)
        param.grad = torch.zeros(1, 2)
        optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], torch.full((1, 2), 0.5**0.5))
    torch.testing.assert_close(ends[1], torch.tensor([[0.6, 0.8]]))


def test_rows_and_singular_values_are_capped_as_in_the_golden_file() -> None:
    inputs, outputs = golden("spectral")
    for plugin, key in ((MaxNorm(0.5), "row_l2_cap_0p5"), (SpectralCap(0.6), "normalize_to_w0p6")):
        (ours,) = projected(plugin, inputs["M"])
        expected = torch.tensor(outputs[key], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_singular_vectors_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    (after,) = projected(SpectralCap(0.7), weights)
    ratio = after / weights
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_power_iteration_follows_a_matrix_that_is_trained() -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(24, 16, generator=generator)
    param = nn.Parameter(torch.randn(24, 16, generator=generator))
    optimizer = stablekit.wrap(torch.optim.SGD([param], lr=0.0003), SpectralCap(2.0))
    largest = []
    for _ in range(300):
        noise = 5 * torch.randn(24, 16, generator=generator)
        param.grad = 2 * (param.detach() - 3 * target) + noise
        optimizer.step()
        largest.append(float(np.linalg.svd(param.detach().numpy(), compute_uv=False).max()))
    assert max(largest) <= 2.0 * (1 + 1e-3)


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (6, 6)])
def test_a_matrix_that_starts_at_zero_is_capped_when_it_grows(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = stablekit.wrap(torch.optim.SGD([param], lr=0.0), SpectralCap(1.0))
    for number in range(60):
        optimizer.param_groups[0]["lr"] = 0.05 if number else 0.0
        param.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    assert measured("spectral-cap", param.detach()) < 1.1


def test_growth_at_right_angles_to_the_known_direction_is_found() -> None:
    param = nn.Parameter(torch.diag(torch.tensor([4.0, 1.0])))
    optimizer = stablekit.wrap(torch.optim.SGD([param], lr=0.05), SpectralCap(2.0))
    for _ in range(200):
        param.grad = torch.tensor([[0.0, 0.0], [0.0, -1.0]])
        optimizer.step()
    assert measured("spectral-cap", param.detach()) < 2.2


def test_spectral_vectors_travel_in_the_checkpoint() -> None:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(8, 8, generator=generator)
    gradients = [torch.randn(8, 8, generator=generator) for _ in range(8)]

    def new() -> tuple[torch.optim.Optimizer, nn.Parameter]:
        param = nn.Parameter(start.clone())
        return stablekit.wrap(torch.optim.SGD([param], lr=0.1), SpectralCap(1.0)), param

    def go(run: tuple[torch.optim.Optimizer, nn.Parameter], some: list[Tensor]) -> Tensor:
        for gradient in some:
            run[1].grad = gradient.clone()
            run[0].step()
        return run[1].detach()

    whole = go(new(), gradients)
    for at in range(1, 8):
        first, second = new(), new()
        second[1].data.copy_(go(first, gradients[:at]))
        second[0].load_state_dict(first[0].state_dict())
        assert torch.equal(go(second, gradients[at:]), whole), at


@each_mode
def test_the_clip_temperature_stays_in_its_range(mode: str) -> None:
    inputs, outputs = golden("misc")
    scales = list(inputs["logit_scale"].unbind())
    names = [f"tower{i}.logit_scale" for i in range(len(scales))]
    ours = projected(LogitScaleClamp(), *scales, names=names, mode=mode)
    expected = torch.tensor(outputs["logit_scale"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(ours), expected)


def test_a_temperature_under_another_name_must_be_named() -> None:
    scale = torch.tensor(9.0)
    with pytest.raises(AttachError, match="finds no parameter named logit_scale"):
        projected(LogitScaleClamp(), scale, names=["tau"])
    (after,) = projected(LogitScaleClamp(10.0, parameter="tau"), scale, names=["loss.tau"])
    assert after.item() == pytest.approx(math.log(10.0))
