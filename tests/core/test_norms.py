"""Norms are right at any size, dtype and memory layout, and so is what is clipped by them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn, optim

import stablekit
from stablekit import Step, hookimpl
from stablekit.gradients import clip_factor
from stablekit_clipping import AdaGC, GlobalNorm, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import BeforeUpdate, set_gradients, small_model

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 40_000_000


class Reads:
    name = "reads"

    def __init__(self) -> None:
        self.norms = torch.zeros(0)
        self.amaxes = torch.zeros(0)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        self.norms, self.amaxes = step.gradients.raw_norms(), step.gradients.amaxes()


@pytest.fixture(params=[1, 2])
def threads(one_thread: None, request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def many() -> tuple[Tensor, float]:
    """Return 40 million numbers, of slowly growing size, and their norm in float64."""
    noise = torch.randn(MANY, generator=torch.Generator().manual_seed(0))
    noise.mul_(torch.linspace(0.1, 3.0, MANY))
    return noise, math.sqrt(sum(float(c.double().square().sum()) for c in noise.split(1 << 20)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_a_long_tensor_is_exact(
    many: tuple[Tensor, float], threads: int, dtype: torch.dtype
) -> None:
    grad, exact = many[0].to(dtype), many[1]
    if dtype is not torch.float32:
        exact = math.sqrt(sum(float(c.double().square().sum()) for c in grad.split(1 << 20)))
    param = nn.Parameter(torch.empty_like(grad))
    param.grad = grad
    optimizer, reads = optim.SGD([param], lr=0.0), Reads()
    stablekit.attach(optimizer, reads, dry_run=True)
    with stablekit.session(optimizer).paused():
        pass
    optimizer.register_step_pre_hook(_stop)
    with pytest.raises(StopIteration):
        optimizer.step()
    assert float(reads.norms[0]) == pytest.approx(exact, rel=1e-5)


def _stop(*_: object) -> None:
    raise StopIteration  # the norm has been read; the update itself is not of interest


def test_norm_of_many_short_tensors_is_exact() -> None:
    params = [nn.Parameter(torch.zeros(n % 97 + 1)) for n in range(2000)]
    noise = torch.Generator().manual_seed(0)
    for param in params:
        param.grad = torch.randn(param.shape, generator=noise)
    optimizer = optim.SGD(params, lr=0.0)
    session = stablekit.attach(optimizer)
    optimizer.step()
    exact = torch.cat([p.grad for p in params if p.grad is not None]).double().norm()
    assert session.metrics()["grad_norm"] == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize(
    "grad",
    [
        torch.randn(300, 500).t(),
        torch.randn(8, 3, 20, 20).to(memory_format=torch.channels_last),
        torch.randn(2, 600, 700)[:, ::2, ::3],
        torch.randn(70_000).expand(3, 70_000),
        torch.randn(4, 5, dtype=torch.complex64),
        torch.randn(4, 5, dtype=torch.complex64).conj(),
        torch.randn(300, 400, dtype=torch.float64) * 1e-3,
        torch.randn(80_001),
        torch.randn(()),
        torch.zeros(0, 5),
        torch.zeros(0),
    ],
    ids=lambda grad: f"{list(grad.shape)}-{str(grad.dtype)[6:]}-{list(grad.stride())}",
)
def test_any_layout_has_its_norm_and_largest_element(grad: Tensor) -> None:
    params = [nn.Parameter(torch.zeros_like(grad)), nn.Parameter(torch.zeros(2))]
    params[0].grad, params[1].grad = grad, torch.tensor([3.0, 4.0])
    optimizer, reads = optim.SGD(params, lr=0.0), Reads()
    stablekit.attach(optimizer, reads)
    optimizer.step()
    exact = torch.linalg.vector_norm(grad.flatten().to(torch.complex128)).real
    largest = grad.abs().max() if grad.numel() else torch.tensor(0.0)
    assert reads.norms.tolist() == pytest.approx([float(exact), 5.0], rel=1e-6)
    assert reads.amaxes.tolist() == pytest.approx([float(largest), 4.0], rel=1e-6)
    assert reads.norms.dtype is reads.amaxes.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("limit", [0.1, 1.0, 3.0])
def test_clipped_norm_is_at_most_the_limit(dtype: torch.dtype, fused: bool, limit: float) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(500, 300).to(dtype)) for _ in range(3)]
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    optimizer = optim.AdamW(params, fused=fused)
    stablekit.attach(optimizer, GlobalNorm(limit))
    optimizer.step()
    after = torch.stack([p.grad.double().norm() for p in params if p.grad is not None]).norm()
    assert limit * (1 - 1e-3) <= float(after) <= limit * (1 + 1e-3)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_scaling_a_half_precision_gradient_rounds_only_the_result(per_tensor: bool) -> None:
    factor = torch.tensor(0.123456)

    class Scales:
        name = "scales"

        @hookimpl
        def transform_gradients(self, step: Step) -> None:
            step.gradients.scale_(factor.expand(2) if per_tensor else factor)

    params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(2)]
    grads = [torch.randn(1000).bfloat16() for _ in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer, seen = optim.SGD(params, lr=0.1), BeforeUpdate()
    stablekit.attach(optimizer, Scales(), seen)
    optimizer.step()
    for grad, after in zip(grads, seen.seen[0], strict=True):
        assert torch.equal(after, (grad.float() * factor).bfloat16())


@pytest.mark.parametrize("device_mode", [False, True])
def test_infinite_norm_gives_factor_zero_and_nan_factor_one(device_mode: bool) -> None:
    for bad, expected in ((math.inf, 0.0), (math.nan, 1.0)):
        model, factors = small_model(), list[Tensor]()

        class Looks:
            name = "looks"

            @hookimpl
            def transform_gradients(self, step: Step, into: None = None) -> None:
                step.gradients.scale_(clip_factor(step.gradients.norm(), 1.0))
                factors.extend([step.gradients.norm(), step.gradients.norms()[1]])  # noqa: B023

        optimizer, seen = optim.SGD(model.parameters(), lr=0.0), BeforeUpdate()
        stablekit.attach(optimizer, Looks(), seen, device_mode=device_mode)
        set_gradients(model.parameters(), bad, 0.25)
        optimizer.step()
        assert bool((seen.seen[0][1] == 0.25 * expected).all())
        derived = 0.0 if expected == 0.0 else math.nan
        assert float(factors[0]) == pytest.approx(derived, nan_ok=True)
        assert float(factors[1]) == pytest.approx(expected)  # 16 elements of 0.25


@pytest.mark.parametrize(
    ("value", "kind", "culprits"),
    [
        (math.nan, "nan", ("group0.1(16)",)),
        (math.inf, "inf", ("group0.1(16)",)),
        (-math.inf, "inf", ("group0.1(16)",)),
        (2e19, "overflow", ("group0.1(16)",)),
        (3e38, "overflow", ("group0.1(16)",)),
    ],
)
def test_nonfinite_event_says_what_it_is_and_where(
    value: float, kind: str, culprits: tuple[str, ...]
) -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    session = stablekit.attach(optimizer, NonFiniteGuard())
    params = list(model.parameters())
    set_gradients(params, 1.0)
    assert params[1].grad is not None
    params[1].grad[3] = value
    optimizer.step()
    event = session.events[0]
    assert (event.kind, event.data["kind"], event.tensors) == ("nonfinite", kind, culprits)
    assert session.skipped == 1


def test_no_statistic_takes_in_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf, 3e38):
        runs = []
        for poisoned in (False, True):
            model = small_model()
            optimizer = optim.SGD(model.parameters(), lr=0.0)
            session = stablekit.attach(optimizer, ZClip(warmup_steps=2), AdaGC(warmup_steps=2))
            for step in range(6):
                if poisoned and step in (0, 3):
                    set_gradients(model.parameters(), bad)
                    optimizer.step()
                set_gradients(model.parameters(), 1.0 + step / 10)
                optimizer.step()
            runs.append(session.state_dict()["plugins"]["zclip"])
        assert runs[0] == runs[1]
