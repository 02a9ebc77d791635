"""One model, two sessions: what acts twice is refused, what is lost is found."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import AttachError
from stablekit_logits import (
    ErrorNormTruncation,
    GradientPenalty,
    LogitClip,
    SoftCap,
    ZLoss,
    sessions_on,
)
from tests.logits.models import Speaker, words
from tests.logits.small import Classifier, classifier, samples

if TYPE_CHECKING:
    from collections.abc import Callable

MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "loss function": (Speaker, lambda **options: ZLoss(0.1, **options)),
    "output": (Speaker, lambda **options: ZLoss(0.1, on="head", **options)),
    "cap": (Speaker, lambda **options: SoftCap(2.0, **options)),
    "rows": (Classifier, lambda **options: LogitClip(1.0, on="head", **options)),
    "loss module": (
        Classifier,
        lambda **options: ErrorNormTruncation(1.2, warmup_steps=1, on="loss", **options),
    ),
    "critic": (lambda: nn.Linear(2, 1), lambda **options: GradientPenalty(**options)),
}
every_door = pytest.mark.parametrize(("model", "make"), MAKERS.values(), ids=MAKERS.keys())


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@every_door
def test_a_cell_run_again_is_an_error_until_the_session_is_detached(
    model: Callable[[], nn.Module], make: Callable[..., Any]
) -> None:
    trained = model()
    first = stablekit.attach(rate(trained), make(), model=trained)
    name = make().name
    with pytest.raises(AttachError, match=rf"^{name} of another session, .*detach\(\)"):
        stablekit.attach(rate(trained), make(), model=trained)
    assert sessions_on(trained) == [first]
    first.detach()
    with stablekit.attach(rate(trained), make(), model=trained) as second:
        assert sessions_on(trained) == [second]


@every_door
def test_another_name_says_that_both_are_meant(
    model: Callable[[], nn.Module], make: Callable[..., Any]
) -> None:
    trained = model()
    with (
        stablekit.attach(rate(trained), make(), model=trained) as first,
        stablekit.attach(rate(trained), make(name="another"), model=trained) as second,
    ):
        assert {*sessions_on(trained)} == {first, second}


@pytest.mark.parametrize("first", [None, "head"])
def test_the_other_door_of_the_same_plugin_is_refused_too(first: str | None) -> None:
    model = Speaker()
    other = "head" if first is None else None
    stablekit.attach(rate(model), ZLoss(0.1, on=first), model=model)
    with pytest.raises(AttachError, match="another session"):
        stablekit.attach(rate(model), ZLoss(0.1, on=other), model=model)


@every_door
def test_an_instance_refused_for_a_second_session_goes_on_in_the_first(
    model: Callable[[], nn.Module], make: Callable[..., Any]
) -> None:
    trained, plugin = model(), make()
    session = stablekit.attach(rate(trained), plugin, model=trained)
    with pytest.raises(AttachError, match="another session"):
        stablekit.attach(rate(trained), plugin, model=trained)
    assert sessions_on(trained) == [session]
    session.detach()
    assert not any(module._forward_hooks for module in trained.modules())


def test_the_term_is_still_there_after_a_refusal() -> None:
    model, ids, plugin = Speaker(), words(), ZLoss(0.1)
    plain = model(ids, ids)
    stablekit.attach(rate(model), plugin, model=model)
    once = model(ids, ids)
    with pytest.raises(AttachError, match="another session"):
        stablekit.attach(rate(model), plugin, model=model)
    assert torch.equal(model(ids, ids), once)
    assert float((once - plain).detach()) > 0


@every_door
def test_copies_of_a_model_are_free_for_sessions_of_their_own(
    model: Callable[[], nn.Module], make: Callable[..., Any]
) -> None:
    trained = model()
    stablekit.attach(rate(trained), make(), model=trained)
    copied = copy.deepcopy(trained)
    assert sessions_on(copied) == []
    stablekit.attach(rate(copied), make(), model=copied).detach()


def test_a_copied_loss_module_does_not_truncate() -> None:
    model = classifier()
    optimizer = rate(model)
    plugin = ErrorNormTruncation(0.0, warmup_steps=1, on="loss")
    stablekit.attach(optimizer, plugin, model=model)
    x, y = samples(0)
    model.loss(model(x), y).backward()
    optimizer.step()
    copied = copy.deepcopy(model)
    plain = nn.functional.cross_entropy(model(x), y)
    assert model.loss(model(x), y).item() == 0.0
    assert torch.equal(copied.loss(copied(x), y), plain)
