"""ContrastiveMonitor records gap, alignment, uniformity and scale of two embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit_monitors import ContrastiveMonitor, contrastive_monitor
from tests.monitors.watched import Run, Transformer, outputs_of


def by_hand(passes: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the metrics of some forward passes, pair by pair in double precision."""
    units = [[nn.functional.normalize(one.double(), dim=1) for one in both] for both in passes]
    near: list[list[float]] = [[], []]
    for both in units:
        for side, rows in enumerate(both):
            for i in range(len(rows)):
                for j in range(i):
                    near[side].append(math.exp(-2 * float((rows[i] - rows[j]).square().sum())))
    apart = [float((x - y).square().sum()) for both in units for x, y in zip(*both, strict=True)]
    gaps = [float((x.mean(0) - y.mean(0)).norm()) for x, y in units]
    return {
        "contrastive-monitor/gap": sum(gaps) / len(gaps),
        "contrastive-monitor/alignment": sum(apart) / len(apart),
        "contrastive-monitor/uniformity_first": math.log(sum(near[0]) / len(near[0])),
        "contrastive-monitor/uniformity_second": math.log(sum(near[1]) / len(near[1])),
    }


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith("contrastive-monitor/")}


def test_two_named_modules_are_measured_pass_by_pass() -> None:
    first, second = outputs_of(Transformer(), ["first", "second"], 4, 5)
    run = Run(ContrastiveMonitor(1, first="first", second="second"))
    expected = by_hand(list(zip(first, second, strict=True)))
    assert own(run.step(4, 5)) == pytest.approx(expected, rel=1e-5)


class Towers(nn.Module):
    """A CLIP in miniature: its output has two embeddings, it has a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.0)))
        self.image_embeds, self.text_embeds = torch.zeros(0), torch.zeros(0)

    def forward(self, images: Tensor, texts: Tensor) -> Towers:
        self.image_embeds, self.text_embeds = self.image(images), self.text(texts)
        return self


def one_step(run: Run) -> dict[str, float]:
    made = torch.Generator().manual_seed(run.number)
    images, texts = torch.randn(6, 4, generator=made), torch.randn(6, 5, generator=made)
    seen = run.model(images, texts)
    logits = seen.image_embeds @ seen.text_embeds.T * run.model.logit_scale.exp()
    nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    pair = seen.image_embeds.detach().clone(), seen.text_embeds.detach().clone()
    run.optimizer.step()
    return by_hand([pair])


def test_embeddings_and_scale_of_a_clip_model_are_found() -> None:
    run = Run(ContrastiveMonitor(1), model=Towers())
    expected = one_step(run)
    found = own(run.metrics())
    scale = run.model.logit_scale.exp().item()
    assert scale != pytest.approx(14.0, rel=1e-6)
    assert found.pop("contrastive-monitor/logit_scale") == pytest.approx(scale)
    assert found == pytest.approx(expected, rel=1e-5)


def test_of_a_large_batch_the_first_rows_make_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    x = nn.functional.normalize(x, dim=1)
    expected = contrastive_monitor.uniformity(x[:4])
    monkeypatch.setattr(contrastive_monitor, "_PAIRED", 4)
    assert contrastive_monitor.uniformity(x) == expected


def test_one_row_has_no_uniformity_but_a_gap() -> None:
    model = Towers()
    run = Run(ContrastiveMonitor(1), model=model)
    model(torch.ones(1, 4), torch.ones(1, 5)).image_embeds.sum().backward()
    run.optimizer.step()
    metrics = run.metrics()
    assert math.isnan(metrics["contrastive-monitor/uniformity_first"])
    assert 0 < metrics["contrastive-monitor/gap"] <= 2


def test_perfect_and_collapsed_embeddings_are_at_the_ends_of_the_scales() -> None:
    x = torch.eye(4)
    same = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    assert contrastive_monitor.alignment(x, x) == 0
    assert contrastive_monitor.uniformity(same) == 0
    assert contrastive_monitor.uniformity(x).item() == pytest.approx(-4.0)
    assert contrastive_monitor.modality_gap(same, -same) == 2


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="name both"):
        ContrastiveMonitor(first="image")
    with pytest.raises(AttachError, match=r"must name one module, it matches blocks\.0, blocks\.1"):
        Run(ContrastiveMonitor(first="blocks.*", second="second"))


def test_outputs_that_are_no_rows_are_reported_as_unseen() -> None:
    run = Run(ContrastiveMonitor(1, first="head", second="second"))
    run.step()
    assert len(run.events("unseen")) == 1
