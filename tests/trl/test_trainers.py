"""The callback of the Transformers adapter in the trainers of TRL."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers", reason="the trainers of trl need transformers")

from stablekit_transformers import StableKitCallback, attach
from tests.trl import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

trl = pytest.importorskip("trl", reason="these tests run the trainers of trl")
datasets = pytest.importorskip("datasets", reason="the trainers of trl take datasets")
# trl 1.16 reads a property that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
FAULTS = {2: math.nan, 4: 1e6}


def trainer_of(
    method: str, model: GPT2LMHeadModel, folder: Path, *callbacks: TrainerCallback
) -> Trainer:
    """Return a trainer of trl, told nothing about stablekit but the callbacks."""
    text = tiny.sentences(48)
    pairs = {"prompt": text[:16], "chosen": text[16:32], "rejected": text[32:]}
    recipes: dict[str, tuple[dict[str, Any], ...]] = {
        "SFT": ({"text": text}, {"max_length": 32}, {}),
        "DPO": (pairs, {"max_length": 64}, {"ref_model": tiny.model({})}),
        "GRPO": (
            {"prompt": [line[:12] for line in text]},
            {"num_generations": 2, "max_completion_length": 8},
            {"reward_funcs": plainness},
        ),
    }
    columns, options, more = recipes[method]
    made: Trainer = getattr(trl, f"{method}Trainer")(
        model,
        args=getattr(trl, f"{method}Config")(**tiny.arguments(folder), **options),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tiny.tokenizer(),
        callbacks=[*callbacks],
        **more,
    )
    return made


def plainness(completions: list[str], **_: object) -> list[float]:
    """Reward completions for their ASCII letters; a random model writes half of them."""
    return [float(sum(letter.isascii() for letter in text)) for text in completions]


def is_finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_a_nan_is_skipped_and_a_spike_clipped_where_stock_trl_loses_the_weights(
    method: str, tmp_path: Path
) -> None:
    stock = tiny.model(FAULTS)
    with contextlib.suppress(RuntimeError):  # GRPO cannot even sample from weights that are NaN
        trainer_of(method, stock, tmp_path).train()
    assert not is_finite(stock)

    model, callback = tiny.model(FAULTS), StableKitCallback("nonfinite-guard", "zclip")
    trainer = trainer_of(method, model, tmp_path, callback)
    trainer.train()
    session = callback.session
    assert is_finite(model)
    assert (session.number, session.skipped) == (tiny.STEPS, 1)
    assert [event.step for event in session.events if event.kind == "skip"] == [3]
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert rows[5]["grad_norm"] > 1e3
    assert rows[5]["grad_norm_clipped"] <= 1.001
    assert rows[6]["steps_skipped"] == 1


def test_attached_to_the_trainer_the_guard_names_the_one_tensor_that_is_bad(
    tmp_path: Path,
) -> None:
    model = tiny.model(FAULTS)
    trainer = trainer_of("SFT", model, tmp_path)
    callback = attach(trainer, "nonfinite-guard", "zclip")
    trainer.train()
    assert is_finite(model)
    (skip,) = [event for event in callback.session.events if event.kind == "skip"]
    assert skip.tensors == ("transformer.wte.weight",)
