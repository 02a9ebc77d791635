"""UpdateMonitor records update-to-weight ratios and Adam's RMS_t."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit_monitors import UpdateMonitor
from stablekit_monitors.update_monitor import squared_staleness
from tests.monitors.watched import Run, Transformer, backward

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02, foreach=False),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.02, alpha=0.9),
}


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("update-monitor/")}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def give_gradients(model: nn.Module, number: int) -> None:
    make = torch.Generator().manual_seed(number)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=make) * (1 + number)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_ratios_are_update_norms_over_weight_norms(name: str, device_mode: bool) -> None:
    model = small()
    monitor = UpdateMonitor(1, per_tensor=True)
    run = Run(monitor, model=model, make=OPTIMIZERS[name], device_mode=device_mode)
    for number in range(3):
        before = [param.detach().double().clone() for param in model.parameters()]
        give_gradients(model, number)
        run.optimizer.step()
        moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
        found = own(run.metrics())
        names = [key for key, _ in model.named_parameters()]
        each = [float(m.norm() / b.norm()) for m, b in zip(moved, before, strict=True)]
        assert [found[f"ratio/{key}"] for key in names] == pytest.approx(each, rel=1e-4)
        total = math.hypot(*(m.norm() for m in moved)) / math.hypot(*(b.norm() for b in before))
        assert found["ratio"] == pytest.approx(total, rel=1e-4)
        assert found["ratio_log10"] == pytest.approx(math.log10(total), abs=1e-4)
        assert found["ratio_largest"] == pytest.approx(max(each[0], each[2]), rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_rms_is_that_of_gradients_over_debiased_second_moments(name: str) -> None:
    model = small()
    run = Run(UpdateMonitor(1, per_tensor=True), model=model, make=OPTIMIZERS[name])
    moments = [torch.zeros_like(param).double() for param in model.parameters()]
    for number in range(4):
        give_gradients(model, number)
        grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
        moments = [0.999 * v + 0.001 * g**2 for v, g in zip(moments, grads, strict=True)]
        run.optimizer.step()
        debiased = [v / (1 - 0.999 ** (number + 1)) for v in moments]
        parts = [g**2 / v for g, v in zip(grads, debiased, strict=True)]
        found = own(run.metrics())
        names = [key for key, _ in model.named_parameters()]
        each = [float(part.mean().sqrt()) for part in parts]
        assert [found[f"rms/{key}"] for key in names] == pytest.approx(each, rel=1e-4)
        every = torch.cat([part.flatten() for part in parts])
        assert found["rms"] == pytest.approx(float(every.mean().sqrt()), rel=1e-4)
        assert found["rms_largest"] == pytest.approx(max(each), rel=1e-4)
        if number == 0:
            assert found["rms"] == pytest.approx(1.0, rel=1e-5)


def test_rms_is_of_the_gradient_that_the_optimizer_saw() -> None:
    alone = Run(UpdateMonitor(1), model=small(), make=OPTIMIZERS["adamw fused"])
    clipped = Run("global-norm", UpdateMonitor(1), model=small(), make=OPTIMIZERS["adamw fused"])
    for number in range(3):
        for run in (alone, clipped):
            give_gradients(run.model, number)
        torch.nn.utils.clip_grad_norm_(alone.model.parameters(), 1.0)
        alone.optimizer.step()
        clipped.optimizer.step()
        assert own(clipped.metrics()) == pytest.approx(own(alone.metrics()), rel=1e-5)


def test_staleness_of_a_long_tensor_is_summed_in_parts_without_losing_digits() -> None:
    make = torch.Generator().manual_seed(0)
    gradient, moment = (torch.rand(700, 900, generator=make) for _ in range(2))
    found = squared_staleness(gradient, moment, correction=0.5, eps=0.3)
    expected = (gradient.double() ** 2 / (moment.double() / 0.5).clamp(min=0.09)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert squared_staleness(torch.zeros(0), torch.zeros(0)) == 0


def test_an_optimizer_without_second_moments_has_no_rms() -> None:
    found = own(Run(UpdateMonitor(1, rms_alarm=1.0), make=OPTIMIZERS["sgd"]).step())
    assert set(found) == {"ratio", "ratio_log10", "ratio_largest"}


def test_a_projection_after_the_update_is_part_of_it() -> None:
    class Halve:
        name = "halve"

        @stablekit.hookimpl
        def after_update(self, step: stablekit.Step) -> None:
            for param in step.parameters:
                param.detach().mul_(0.5)

    run = Run(Halve(), UpdateMonitor(1), make=lambda params: torch.optim.SGD(params, lr=0.0))
    assert own(run.step())["ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_a_skipped_step_has_no_ratio(device_mode: bool) -> None:
    run = Run(
        "nonfinite-guard", UpdateMonitor(1), device_mode=device_mode, make=OPTIMIZERS["adamw fused"]
    )
    backward(run.model)
    next(p.grad for p in run.model.parameters() if p.grad is not None)[0, 0] = math.nan
    run.optimizer.step()
    assert all(math.isnan(value) for value in own(run.metrics()).values())
    assert bool(own(run.metrics())) == device_mode


def test_the_parameters_are_copied_in_sampled_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Size] = []
    clone = Tensor.clone

    def counted(tensor: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - as torch
        copies.append(tensor.shape)
        return clone(tensor, **options)

    run = Run(UpdateMonitor(3))
    monkeypatch.setattr(Tensor, "clone", counted)
    per_step = []
    for _ in range(4):
        copies.clear()
        run.step()
        shapes = {param.shape for param in run.model.parameters() if param.ndim > 1}
        per_step.append(sum(shape in shapes for shape in copies))
    matrices = sum(param.ndim > 1 for param in run.model.parameters())
    assert per_step == [0, 0, matrices, 0]


def test_only_the_chosen_tensors_are_measured() -> None:
    monitor = stablekit.only(UpdateMonitor(1, per_tensor=True), include="head.*")
    found = own(Run(monitor).step())
    assert {key for key in found if "/" in key} == {"ratio/head.weight", "ratio/head.bias"}


def test_alarms_name_the_worst_tensors_first() -> None:
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(2, 2)) for name in ("a", "b", "c", "vector")}
    )
    model["vector"] = nn.Parameter(torch.ones(2) * 1e-6)
    run = Run(
        UpdateMonitor(1, ratio_alarm=0.015, rms_alarm=1.2),
        model=model,
        make=lambda params: torch.optim.Adam(params, lr=1e-8),
    )
    for gradients in ((1.0, 1.0, 1.0), (1.0, 40.0, 70.0)):
        for param, value in zip(model.values(), (*gradients, 1.0), strict=True):
            param.grad = torch.full_like(param, value)
        run.optimizer.step()
    (event,) = run.events("stale-moments")
    assert (event.step, event.tensors) == (2, ("c", "b"))
    assert event.data["rms"] == pytest.approx(own(run.metrics())["rms_largest"])
    assert event.message.endswith(f"rms above 1.2, {event.data['rms']:.4g} in c")
    assert run.events("large-update") == []
    run.optimizer.param_groups[0]["lr"] = 0.1
    before = {key: param.detach().clone() for key, param in model.items()}
    for param, value in zip(model.values(), (0.0, 1.0, 2.0, 1.0), strict=True):
        param.grad = torch.full_like(param, value)
    run.optimizer.step()
    (large,) = run.events("large-update")
    worst_first = sorted("abc", key=lambda key: before[key].dist(model[key]), reverse=True)
    assert list(large.tensors) == worst_first != ["a", "b", "c"][::-1]


def test_weights_and_gradients_that_are_missing_are_no_division_by_zero() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    run = Run(UpdateMonitor(1, per_tensor=True), model=model, make=OPTIMIZERS["adamw"])
    run.optimizer.zero_grad()
    run.optimizer.step()
    model.weight.grad = torch.ones(2, 2)
    run.optimizer.step()
    found = own(run.metrics())
    assert found["ratio/weight"] == 0.0
    assert found["rms/weight"] == pytest.approx(1.0)
    assert all(math.isfinite(value) for value in found.values())


def test_bf16_weights_and_moments_are_measured_in_float32() -> None:
    model = Transformer().bfloat16()
    run = Run(UpdateMonitor(1), model=model, make=OPTIMIZERS["adamw"])
    before = [param.detach().double().clone() for param in model.parameters()]
    found = own(run.step())
    moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
    norms = [math.hypot(*(one.norm() for one in many)) for many in (moved, before)]
    assert found["ratio"] == pytest.approx(norms[0] / norms[1], rel=0.01)
    squares, count = 0.0, 0
    for param in model.parameters():
        assert param.grad is not None
        debiased = run.optimizer.state[param]["exp_avg_sq"].double() / 0.001
        squares += float((param.grad.double() ** 2 / debiased.clamp(min=1e-16)).sum())
        count += param.numel()
    assert found["rms"] == pytest.approx(math.sqrt(squares / count), rel=1e-4)


def test_a_step_that_raises_leaves_nothing_for_the_next() -> None:
    class Broken(torch.optim.SGD):
        fails = False

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            if self.fails:
                raise RuntimeError("out of memory")
            super().step(closure)

    run = Run(UpdateMonitor(2), make=lambda params: Broken(params, lr=0.1))
    broken: Any = run.optimizer
    run.step()
    broken.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run.step()
    broken.fails = False
    assert own(run.step()) == {}
    assert own(run.step())["ratio"] > 0


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="every"):
        UpdateMonitor(0)
    with pytest.raises(ValueError, match="ratio_alarm"):
        UpdateMonitor(ratio_alarm=0.0)
    with pytest.raises(TypeError, match="per_tensor"):
        UpdateMonitor(per_tensor="yes")  # type: ignore[arg-type]
