"""What holds for every model that was operated on, whatever the surgery."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch

import stablekit_layers
from tests.layers.models import logits, tokens, train, transformers

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from stablekit_layers import Surgery


def copies_have_their_own_modules(model: Any) -> None:  # noqa: ANN401 - a model of transformers
    before = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), before)
    train(copied)
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)


def checkpointing_changes_nothing(model: Any) -> None:  # noqa: ANN401
    expected = _gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has another name in newer versions
        model.gradient_checkpointing_enable()
    found = _gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def compiling_changes_nothing(model: Any) -> None:  # noqa: ANN401
    other = copy.deepcopy(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(other, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute")  # dynamo's own, in GPT-2's loss
        losses = train(other, forward=lambda **batch: compiled(**batch))
    for ours, theirs in zip(losses, train(model), strict=True):
        assert torch.equal(ours, theirs)


def generation_with_a_cache_is_the_same(model: Any) -> None:  # noqa: ANN401
    ids = tokens()[:, :5]
    logits(model)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **given)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **given))
    assert cached.shape[1] > ids.shape[1]


def saved_and_loaded_it_is_the_same(
    model: Any,  # noqa: ANN401
    surgery: Surgery,
    folder: Path,
) -> None:
    expected = logits(model)
    model.save_pretrained(folder)
    loaded = stablekit_layers.load(type(model), folder, surgeries=[surgery])
    assert torch.equal(logits(loaded), expected)
    for ours, theirs in zip(train(loaded), train(model), strict=True):
        assert torch.equal(ours, theirs)


def trainer_decays_matrices_only_and_trains(model: Any, folder: Path) -> None:  # noqa: ANN401
    given = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=6)]
    trainer = transformers.Trainer(model, given, train_dataset=rows)
    decayed = set(trainer.get_decay_parameter_names(model))
    named = dict(model.named_parameters())
    matrices = {name for name, param in named.items() if param.ndim > 1}
    assert decayed & named.keys() == matrices  # a tied head goes by two names
    before = {name: param.detach().clone() for name, param in named.items()}
    trainer.train()
    assert all(not torch.equal(named[name], before[name]) for name in _added(named))


def _added(named: dict[str, Tensor]) -> list[str]:
    return [name for name in named if "_norm" in name]


def _gradients(model: Any) -> dict[str, Tensor]:  # noqa: ANN401
    model.train()
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    return found
