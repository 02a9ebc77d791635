"""The loss of a step under accumulation, and Trainer's clipping beside plugins of the loss."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, Watch, equipped
from tests.transformers.tiny import gpt2, steps, text, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [64, 10])
def test_the_loss_of_a_step_is_the_sum_of_its_parts(mode: str, rows: int, tmp_path: Path) -> None:
    """Ten rows are a step of four micro-batches and one of a single one."""
    made, _ = equipped(mode, tmp_path, rows=text(rows), gradient_accumulation_steps=4)
    made.train()
    assert [entry["step_loss"] for entry in steps(made)] == pytest.approx(
        [entry["loss"] for entry in steps(made)], rel=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_trainer_divides_itself_are_averaged(mode: str, tmp_path: Path) -> None:
    """A model without ``num_items_in_batch`` returns the mean of each micro-batch."""
    watch = Watch()
    made, _ = equipped(mode, tmp_path, watch, gradient_accumulation_steps=4)
    made.model_accepts_loss_kwargs = False
    made.train()
    assert watch.losses == pytest.approx([entry["loss"] for entry in steps(made)], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_plugin_of_the_loss_does_not_replace_clipping(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ent = "error-norm-truncation:fraction=0.1,warmup_steps=100,divisor=kept"
    made, callback = equipped(mode, tmp_path, ent, "z-loss:weight=0.0", max_grad_norm=0.5)
    with caplog.at_level(logging.WARNING, "stablekit_transformers"):
        made.train()
    bare = trainer(tmp_path, max_grad_norm=0.5)
    bare.train()
    assert list(callback.session.plugins)[-1] == "global-norm"
    torch.testing.assert_close(weights(made.model), weights(bare.model), rtol=1e-5, atol=1e-6)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "max_grad_norm=0.5 is applied by the plugin global-norm" in told
    assert "see the gradients" not in told


def test_the_log_names_those_that_gradients_would_be_hidden_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = StableKitCallback("z-loss", "adagc", "soft-cap", Watch())
    with caplog.at_level(logging.WARNING, "stablekit_transformers"):
        trainer(tmp_path, model=gpt2(), callbacks=[callback]).train()
    assert "hide the gradients from adagc, watch;" in caplog.text
