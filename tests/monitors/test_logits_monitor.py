"""LogitsMonitor records logsumexp and the largest logit."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stablekit_monitors import LogitsMonitor, logits_monitor
from stablekit_monitors.logits_monitor import logit_sizes
from tests.monitors.watched import Run, Transformer, outputs_of


def by_hand(logits: Tensor) -> dict[str, float]:
    """Return the metrics of logits, in double precision and without logsumexp."""
    partition = logits.double().exp().sum(-1).log()
    return {
        "logits-monitor/logsumexp": partition.mean().item(),
        "logits-monitor/logsumexp_largest": partition.max().item(),
        "logits-monitor/largest": logits.abs().max().item(),
    }


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith("logits-monitor/")}


def test_all_positions_of_all_micro_batches_count() -> None:
    (seen,) = outputs_of(Transformer(), [""], 4, 5)
    found = own(Run(LogitsMonitor(1)).step(4, 5))
    assert found == pytest.approx(by_hand(torch.cat(seen)), rel=1e-6)


def test_a_module_may_be_named_instead_of_the_output() -> None:
    (seen,) = outputs_of(Transformer(), ["head"], 4)
    found = own(Run(LogitsMonitor(1, module="head")).step(4))
    assert found == pytest.approx(by_hand(torch.cat(seen)), rel=1e-6)


def test_large_logits_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 5, 13, generator=torch.Generator().manual_seed(0)) * 20
    whole = logit_sizes(logits)
    monkeypatch.setattr(logits_monitor, "_AT_ONCE", 30)
    torch.testing.assert_close(logit_sizes(logits), whole)
    assert whole[1] == 35


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)).bfloat16() * 40
    total, count, highest, peak = logit_sizes(logits).tolist()
    expected = torch.logsumexp(logits.double(), -1)
    assert total / count == pytest.approx(expected.mean().item(), rel=1e-6)
    assert highest == pytest.approx(expected.max().item(), rel=1e-6)
    assert peak == logits.abs().max().item()


class Output(NamedTuple):
    """What a model of transformers returns."""

    logits: Tensor | None
    hidden: Tensor


class Headed(nn.Module):
    """Returns named outputs, with or without logits."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.fused = fused

    def forward(self, x: Tensor) -> Output:
        made = self.layer(x)
        return Output(None if self.fused else made, made)


def test_logits_of_a_named_output_are_found() -> None:
    model = Headed(fused=False)
    run = Run(LogitsMonitor(1), model=model)
    out = model(torch.ones(4, 2))
    out.hidden.sum().backward()
    expected = by_hand(out.hidden.detach())
    run.optimizer.step()
    assert own(run.metrics()) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_never_makes_logits_is_reported() -> None:
    model = Headed(fused=True)
    run = Run(LogitsMonitor(1), model=model)
    for _ in range(3):
        model(torch.ones(4, 2)).hidden.sum().backward()
        run.optimizer.step()
    (event,) = run.events("unseen")
    assert event.step == 1
    assert all(math.isnan(value) for value in own(run.metrics()).values())


def test_logits_that_are_not_finite_show_as_infinite() -> None:
    run = Run(LogitsMonitor(1))
    with torch.no_grad():
        run.model.head.bias[0] = math.nan
    metrics = own(run.step())
    assert metrics["logits-monitor/largest"] == math.inf
    assert not math.isfinite(metrics["logits-monitor/logsumexp"])
