"""Which module makes the logits: by name, by number, and what is proposed where it is not clear."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import AttachError
from stablekit_logits import GradientPenalty, LogitClip, SoftCap, ZLoss
from stablekit_logits._heads import head_names
from tests.logits.models import Speaker


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("plugin", ["logit-clip:tau=0.1,on=2", LogitClip(0.1, on=2)])
def test_a_number_names_a_module_of_a_sequence(plugin: str | LogitClip) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    with stablekit.attach(rate(model), plugin, model=model):
        torch.testing.assert_close(model(torch.full((1, 2), 50.0)).norm(), torch.tensor(0.1))


@pytest.mark.parametrize("kind", [ZLoss, SoftCap, LogitClip, GradientPenalty])
def test_what_is_neither_name_nor_number_is_refused(kind: type) -> None:
    assert kind(on=0).on == "0"
    for value in (True, 1.5, ["head"]):
        with pytest.raises(TypeError, match="on must be a string"):
            kind(on=value)


def test_the_output_embedding_is_it_wherever_it_is() -> None:
    model = nn.ModuleDict({"model": Speaker(), "probe": nn.Linear(6, 2)})
    assert head_names(model) == ["model.head"]


def test_a_layer_of_as_many_outputs_as_labels_comes_before_others() -> None:
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "score": nn.Linear(4, 3), "other": nn.Linear(4, 5)}
    )
    assert head_names(model) == ["other", "score", "body"]
    object.__setattr__(model, "config", SimpleNamespace(num_labels=3))
    assert head_names(model) == ["score"]


def test_a_wrong_name_is_answered_with_that_of_the_head() -> None:
    model = Speaker()
    with pytest.raises(AttachError, match=r"perhaps on='head'.*on='score' matches no module"):
        stablekit.attach(rate(model), ZLoss(on="score"), model=model)


def test_a_cap_without_an_output_embedding_is_told_what_to_name() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 4), "score": nn.Linear(4, 3)})
    with pytest.raises(AttachError, match=r"no output embedding .* on='score', on='body'"):
        stablekit.attach(rate(model), SoftCap(), model=model)
    wrapped = nn.ModuleDict({"model": Speaker()})
    with pytest.raises(AttachError, match=r"perhaps on='model\.head'"):
        stablekit.attach(rate(wrapped), SoftCap(), model=wrapped)
