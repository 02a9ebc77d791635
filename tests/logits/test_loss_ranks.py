"""Two processes under DDP train as one process on both of their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stablekit_logits import slope_penalty, slopes
from tests.logits.loss_ranks import KINDS, STEPS, WORLD, critic, plugin_of, train
from tests.logits.small import close, same, samples
from tests.logits.starting import saved_by_ranks
from tests.logits.test_gradient_penalty import seen_points

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two processes once and return what each of them saved."""
    return saved_by_ranks("loss_ranks", tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_to_the_bit(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (one[kind] for one in ranks)
    assert same(first[0], second[0])
    own = [{k: v for k, v in one[1].items() if "/" in k} for one in (first, second)]
    assert own[0] == own[1]


@pytest.mark.parametrize("kind", ["clip", "ent"])
def test_weights_and_metrics_are_those_of_one_process(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    weights, metrics = train(kind, plugin_of(kind), None)
    assert close(ranks[0][kind][0], weights, rtol=1e-4)
    for key, value in metrics.items():
        if "/" in key:
            assert ranks[0][kind][1][key] == pytest.approx(value, rel=1e-4)


def test_each_rank_penalises_its_own_pairs(ranks: list[dict[str, Any]]) -> None:
    model = critic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(STEPS):
        optimizer.zero_grad()
        for x in samples(number)[0].chunk(WORLD):
            points = seen_points(number, 1, x + 1, x)
            loss = model(x + 1).mean() - model(x).mean()
            ((loss + 2 * slope_penalty(slopes(model, points))) / WORLD).backward()
        optimizer.step()
    assert close(ranks[0]["penalty"][0], [param.detach() for param in model.parameters()])
