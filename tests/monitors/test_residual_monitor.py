"""ResidualMonitor records the RMS behind every block, and finds the blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit_monitors import ResidualMonitor
from stablekit_monitors.residual_monitor import blocks_of, mean_square
from tests.monitors.watched import Run, Transformer, outputs_of


def test_rms_is_that_of_all_elements_of_all_micro_batches() -> None:
    run = Run(ResidualMonitor(1))
    seen = outputs_of(Transformer(), ["blocks.0", "blocks.1"], 4, 5)
    metrics = run.step(4, 5)
    expected = [torch.cat(outputs).double().square().mean().sqrt().item() for outputs in seen]
    found = [metrics[f"residual-monitor/blocks.{i}"] for i in range(2)]
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics["residual-monitor/largest"] == max(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_are_summed_without_rounding_or_overflow_in_half_types(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 900).to(dtype)
    expected = x.double().square().mean().item()
    assert mean_square(x).item() == pytest.approx(expected, rel=1e-5)
    assert mean_square(x[0, 0]).item() == pytest.approx(x[0, 0].double().item() ** 2, rel=1e-5)


def test_one_block_that_is_not_finite_spoils_no_other() -> None:
    run = Run(ResidualMonitor(1))
    with torch.no_grad():
        run.model.blocks[1].mlp[0].bias.fill_(math.nan)
    metrics = run.step()
    assert math.isfinite(metrics["residual-monitor/blocks.0"])
    assert math.isnan(metrics["residual-monitor/blocks.1"])
    assert math.isnan(metrics["residual-monitor/largest"])
    with torch.no_grad():
        for param in run.model.parameters():
            param.fill_(0.1)
    assert math.isfinite(run.step()["residual-monitor/largest"])


def test_a_block_that_is_not_called_is_nan_and_the_others_are_not() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    run = Run(ResidualMonitor(1), model=model)
    model["layers"][0](torch.ones(1, 2)).sum().backward()  # type: ignore[index]
    run.optimizer.step()
    metrics = run.metrics()
    assert math.isnan(metrics["residual-monitor/layers.1"])
    assert metrics["residual-monitor/largest"] == metrics["residual-monitor/layers.0"] > 0


class Tupled(nn.Module):
    """Returns its state next to something else, as decoder layers did."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return x * 3, None


def test_of_several_outputs_the_first_tensor_is_taken() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([Tupled()]), "last": nn.Linear(2, 1)})
    run = Run(ResidualMonitor(1), model=model)
    x, _ = model["h"][0](torch.ones(4, 2))  # type: ignore[index]
    model["last"](x).sum().backward()
    run.optimizer.step()
    assert run.metrics()["residual-monitor/h.0"] == pytest.approx(3.0)


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    def towers() -> nn.Module:
        inner = nn.ModuleList([nn.Linear(1, 1)])
        block = nn.ModuleDict({"layers": inner, "mlp": nn.Linear(1, 1)})
        return nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([block])})})

    model = nn.ModuleDict({"text": towers(), "image": towers()})
    assert list(blocks_of(model)) == ["text.encoder.layers.0", "image.encoder.layers.0"]


def test_a_model_without_lists_of_blocks_is_refused_with_what_there_is() -> None:
    model = nn.ModuleDict({"stages": nn.ModuleList([nn.Linear(1, 1)])})
    with pytest.raises(
        AttachError, match=r"blocks='encoder.stages.\*'; there are the lists stages"
    ):
        blocks_of(model)


def test_patterns_match_part_by_part() -> None:
    run = Run(ResidualMonitor(1, blocks="blocks.*"))
    names = {key.partition("/")[2] for key in run.step() if key.startswith("residual")}
    assert names == {"blocks.0", "blocks.1", "largest"}


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="every"):
        ResidualMonitor(0)
    with pytest.raises(TypeError, match="blocks"):
        ResidualMonitor(blocks=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reduce"):
        ResidualMonitor(reduce=1)  # type: ignore[arg-type]
