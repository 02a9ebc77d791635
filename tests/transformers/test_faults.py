"""Faults: what the log says of them, what survives them, and what stock Trainer does."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, equipped
from tests.transformers.tiny import break_gradient, gpt2, llama, steps, text, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAN, INF = float("nan"), float("inf")
CULPRIT = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize("mode", MODES)
def test_the_guard_saves_weights_that_stock_trainer_loses(mode: str, tmp_path: Path) -> None:
    stock = trainer(tmp_path, faults={1: NAN})
    stock.train()
    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "zclip", faults={1: NAN})
    made.train()
    assert not weights(stock.model).isfinite().any()
    assert weights(made.model).isfinite().all()
    assert callback.session.skipped == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_that_trainer_hides_is_in_the_log(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = equipped(mode, tmp_path, "nonfinite-guard", faults={1: NAN})
    with caplog.at_level(logging.WARNING, "stablekit_transformers"):
        made.train()
    entry = steps(made)[1]
    assert entry["loss"] == 0
    assert math.isnan(entry["grad_norm"])
    assert entry["steps_skipped"] == 1
    if mode == "attach":
        assert math.isnan(entry["step_loss"])
    told = [r.getMessage() for r in caplog.records if r.name == "stablekit_transformers"]
    assert any("step 2; nonfinite" in line and "transformer.wte.weight" in line for line in told)


@pytest.mark.parametrize("value", [NAN, INF])
def test_with_the_trainer_in_hand_one_bad_tensor_is_named(value: float, tmp_path: Path) -> None:
    made, callback = equipped("attach", tmp_path, "nonfinite-guard", "zclip")
    break_gradient(made.model, CULPRIT, 1, value)
    made.train()
    assert [event.kind for event in callback.session.events] == ["nonfinite", "skip"]
    assert [event.tensors for event in callback.session.events] == [(CULPRIT,), (CULPRIT,)]
    assert steps(made)[1]["grad_norm"] == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_callback_skips_the_step_but_cannot_single_out_the_tensor(
    value: float, tmp_path: Path
) -> None:
    made, callback = equipped("callback", tmp_path, "nonfinite-guard", "zclip")
    break_gradient(made.model, CULPRIT, 1, value)
    made.train()
    assert callback.session.skipped == 1
    assert CULPRIT in callback.session.events[1].tensors


def test_events_are_logged_twenty_times_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = equipped("attach", tmp_path, "nonfinite-guard:max_consecutive=100", max_steps=25)
    made.faults = dict.fromkeys(range(25), NAN)
    with caplog.at_level(logging.WARNING, "stablekit_transformers"):
        made.train()
    told = [r.getMessage() for r in caplog.records if r.name == "stablekit_transformers"]
    assert sum("; nonfinite:" in line for line in told) == 20
    assert sum("not logged" in line for line in told) == 1


FAULTS = {20: NAN, 41: INF, 42: NAN, 60: 1e4, 61: -1e4, 62: 1e4}


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_tiny_model_learns_through_faults_that_end_stock_training(
    build: Any,  # noqa: ANN401 - a function that makes a model
    tmp_path: Path,
    record_property: Any,  # noqa: ANN401 - pytest's
) -> None:
    def run(model: PreTrainedModel, faults: dict[int, float], *callbacks: object) -> float:
        made = trainer(
            tmp_path,
            model=model,
            callbacks=list(callbacks),
            faults=faults,
            rows=text(2000),
            evaluate=text(100, skip=2000),
            max_steps=100,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=50,
        )
        made.train()
        return float(made.evaluate()["eval_loss"])

    clean = run(build(48), {})
    stock = run(build(48), FAULTS)
    callback = StableKitCallback("nonfinite-guard", "zclip")
    saved = run(build(48), FAULTS, callback)
    figures = {"clean": clean, "stock with faults": stock, "callback with faults": saved}
    record_property("losses", figures)
    print(build.__name__, build(48).num_parameters(), figures)
    print(callback.session.summary())
    assert math.isnan(stock)
    assert callback.session.skipped == 3
    assert saved < clean + 0.15
