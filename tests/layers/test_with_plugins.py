"""Plugins that look at attention see the queries and keys of an operated model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import stablekit
from stablekit.errors import AttachError
from stablekit_layers import PeriNorm, QKNorm, apply
from stablekit_monitors import AttentionMonitor
from stablekit_updates import QKClip
from tests.layers.models import FAMILIES, gpt2, llama, shake, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

each = pytest.mark.parametrize("make", [llama, gpt2])


def operated(make: Callable[..., Any], per: str) -> Any:  # noqa: ANN401
    model = apply(make(initializer_range=0.5, attn_implementation="eager"), QKNorm(per=per))
    shake(model)
    return model


def largest(model: nn.Module) -> list[float]:
    """Return the largest number that goes into the softmax of each layer."""
    seen = []
    softmax = nn.functional.softmax

    def spy(x: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401
        seen.append(float(x[x > -1e9].max()))
        return softmax(x, *args, **options)

    with mock.patch.object(nn.functional, "softmax", spy), torch.no_grad():
        model(input_ids=tokens())
    return seen


def attached(model: nn.Module, *plugins: Any) -> tuple[stablekit.Session, Callable[[], None]]:  # noqa: ANN401
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = stablekit.attach(optimizer, *plugins, model=model)

    def step() -> None:
        model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()

    return session, step


@each
@pytest.mark.parametrize("per", ["head", "projection"])
def test_attention_monitor_measures_what_is_normed(make: Callable[..., Any], per: str) -> None:
    model = operated(make, per)
    expected = largest(model)
    session, step = attached(
        model, AttentionMonitor(1, mode="exact", name="exact"), AttentionMonitor(1, name="bound")
    )
    step()
    metrics = session.metrics()
    exact = [v for k, v in metrics.items() if k.startswith("exact/") and "largest" not in k]
    bound = [v for k, v in metrics.items() if k.startswith("bound/") and "largest" not in k]
    assert exact == pytest.approx(expected, rel=1e-4)
    assert all(high >= low * (1 - 1e-5) for high, low in zip(bound, exact, strict=True))


@pytest.mark.parametrize("per", ["head", "projection"])
def test_qk_clip_scales_the_gains_of_llama(per: str) -> None:
    model = operated(llama, per)
    assert min(largest(model)) > 0.6
    _, step = attached(model, QKClip(0.5))
    for _ in range(2):
        step()
    first, second = largest(model)
    assert first == pytest.approx(0.5, rel=1e-3)
    assert second < 0.5  # its inputs are other ones by now


def test_qk_clip_is_refused_where_the_norm_would_take_it_back() -> None:
    with pytest.raises(AttachError, match="scaling it changes no logit"):
        attached(operated(gpt2, "head"), QKClip(0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_operated_models_train_under_a_session(family: str) -> None:
    model = apply(FAMILIES[family](), PeriNorm())
    session, step = attached(model, "global-norm", "nonfinite-guard")
    for _ in range(3):
        step()
    assert session.updates == 3
    assert session.metrics()["grad_norm"] > 0
