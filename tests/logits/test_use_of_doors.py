"""Training that goes past a plugin is heard of: at once if it always does, at the turn if later."""

from __future__ import annotations

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
)
from tests.logits.models import Speaker, causal_loss, words
from tests.logits.small import Classifier, samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def speak(model: Any, number: int) -> Tensor:  # noqa: ANN401 - a Speaker
    loss: Tensor = model(words(number), words(number))
    return loss


def classify(model: Any, number: int) -> Tensor:  # noqa: ANN401 - a Classifier
    x, y = samples(number)
    loss: Tensor = model.loss(model(x), y)
    return loss


def judge(critic: Any, number: int) -> Tensor:  # noqa: ANN401 - a critic
    torch.manual_seed(number)
    real, fake = torch.randn(4, 2), torch.randn(4, 2)
    loss: Tensor = critic(fake).mean() - critic(real).mean()
    return loss


Case = tuple["Callable[[], nn.Module]", "Callable[[Any, int], Tensor]", "Callable[[], Any]"]
CASES: dict[str, Case] = {
    "loss function": (Speaker, speak, lambda: ZLoss(0.1)),
    "output": (Classifier, classify, lambda: LogitClip(1.0, on="head")),
    "loss module": (
        Classifier,
        classify,
        lambda: ErrorNormTruncation(1.2, warmup_steps=1, on="loss"),
    ),
    "critic": (lambda: nn.Linear(2, 1), judge, GradientPenalty),
}
every_case = pytest.mark.parametrize(("make", "loss", "plugin"), CASES.values(), ids=CASES.keys())


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def events(session: stablekit.Session) -> list[tuple[str, int]]:
    session.metrics()
    return [(event.kind, event.step) for event in session.events]


@every_case
@pytest.mark.parametrize("options", [{}, {"device_mode": True}])
def test_a_model_left_in_eval_mode_is_told_of_once_and_when_it_is_over(
    make: Callable[[], nn.Module],
    loss: Callable[[Any, int], Tensor],
    plugin: Callable[[], Any],
    options: dict[str, Any],
) -> None:
    model = make()
    optimizer = rate(model)
    session = stablekit.attach(optimizer, plugin(), model=model, **options)
    modes = [True, True, False, False, True, False]
    for number, mode in enumerate(modes):
        model.train(mode)
        optimizer.zero_grad()
        loss(model, number).backward()
        optimizer.step()
    expected = [("inactive", 3), ("active", 5), ("inactive", 6)]
    assert events(session) == expected
    assert r"call model.train()" in session.events[0].message


@every_case
def test_a_model_in_eval_mode_from_the_first_step_on_is_an_error_that_says_so(
    make: Callable[[], nn.Module], loss: Callable[[Any, int], Tensor], plugin: Callable[[], Any]
) -> None:
    model = make().eval()
    optimizer = rate(model)
    stablekit.attach(optimizer, plugin(), model=model)
    loss(model, 0).backward()
    with pytest.raises(AttachError, match=r"eval mode, .*call model\.train\(\)"):
        optimizer.step()


def test_validation_between_steps_does_not_count() -> None:
    model = Speaker()
    optimizer = rate(model)
    session = stablekit.attach(optimizer, ZLoss(0.1), model=model)
    for number in range(3):
        speak(model.train(), number).backward()
        optimizer.step()
        with torch.no_grad():
            speak(model.eval(), number)
    assert events(session) == []


def test_a_loss_computed_elsewhere_from_some_step_on_is_told_of() -> None:
    model = Speaker()
    optimizer = rate(model)
    session = stablekit.attach(optimizer, ZLoss(0.1), model=model)
    for number in range(4):
        ids = words(number)
        loss = speak(model, number) if number < 2 else causal_loss(model(ids), ids)
        loss.backward()
        optimizer.step()
    assert events(session) == [("inactive", 3)]
    assert "computed elsewhere" in session.events[0].message


def test_a_cap_acts_in_eval_mode_too_and_so_does_not_complain() -> None:
    model = Speaker().eval()
    optimizer = rate(model)
    session = stablekit.attach(optimizer, SoftCap(2.0), model=model)
    for number in range(2):
        speak(model, number).backward()
        optimizer.step()
    assert events(session) == []
    assert float(model(words()).detach().abs().amax()) <= 2.0


# torch.compile itself instantiates the autograd functions it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("plugin", [lambda: ZLoss(0.1), lambda: ZLoss(0.1, on="head"), SoftCap])
def test_a_compiled_model_is_seen_in_every_step(plugin: Callable[[], Any]) -> None:
    model = Speaker()
    model.loss_function = lambda logits, labels, shift_labels=None: nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    )
    call: Any = torch.compile(model, backend="eager")
    optimizer = rate(model)
    session = stablekit.attach(optimizer, plugin(), model=call)
    for number in range(4):
        speak(call, number).backward()
        optimizer.step()
    assert events(session) == []


@pytest.mark.parametrize(
    ("plugin", "hint"),
    [
        (ZLoss(), r"z-loss:on=head; .*number of micro-batches a step, use no GradScaler"),
        (LogitClip(1e3), r"logit-clip:on=head\), or .*LogitClipLoss"),
        (ErrorNormTruncation(1.2, warmup_steps=1), r"ErrorNormLoss \(compute_loss_func="),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_plugin_has_a_hint_of_its_own(plugin: Any, hint: str) -> None:  # noqa: ANN401 - any plugin
    model, ids = Speaker(), words()
    optimizer = rate(model)
    stablekit.attach(optimizer, plugin, model=model)
    causal_loss(model(ids), ids).backward()
    with pytest.raises(AttachError, match=hint):
        optimizer.step()
