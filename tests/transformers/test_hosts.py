"""What a Trainer can be configured to do, with plugins attached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, Watch, equipped
from tests.transformers.tiny import gpt2, steps, text, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

# Every value of TrainingArguments.optim that needs neither an accelerator nor another package.
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_is_guarded_and_clipped(optim: str, tmp_path: Path) -> None:
    watch = Watch()
    made, callback = equipped(
        "callback", tmp_path, watch, "nonfinite-guard", "zclip", optim=optim, max_steps=5
    )
    made.faults = {2: float("nan")}
    made.train()
    assert callback.session.skipped == 1
    assert callback.session.updates == 4
    assert weights(made.model).isfinite().all()
    assert steps(made)[0]["grad_norm_clipped"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_micro_batches_are_one_step(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, callback = equipped(mode, tmp_path, watch, "zclip", gradient_accumulation_steps=4)
    made.train()
    whole = trainer(tmp_path, per_device_train_batch_size=8)
    whole.train()
    assert callback.session.number == 4
    assert watch.norms[0] == pytest.approx(steps(whole)[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_autocast_trains(mode: str, tmp_path: Path) -> None:
    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "zclip", bf16=True)
    made.train()
    assert callback.session.updates == 4
    assert steps(made)[-1]["grad_norm_clipped"] <= 1 + 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_bf16_model_trains(mode: str, tmp_path: Path) -> None:
    model = gpt2()
    model.bfloat16()
    made, _ = equipped(mode, tmp_path, "nonfinite-guard", "zclip", model=model)
    made.train()
    assert steps(made)[-1]["grad_norm_clipped"] <= 1 + 1e-3


def test_fp16_is_fp32_on_the_cpu_and_trains(tmp_path: Path) -> None:
    made, callback = equipped("attach", tmp_path, "nonfinite-guard", "zclip", fp16=True)
    made.train()
    assert made.accelerator.scaler is None
    assert callback.session.updates == 4


@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_of_accelerate_is_followed(mode: str, tmp_path: Path) -> None:
    """What Trainer does on an accelerator with fp16, forced on the CPU."""
    watch = Watch()
    made, callback = equipped(mode, tmp_path, watch, "nonfinite-guard", "zclip")
    accelerator = made.accelerator
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.autocast_handler = None
    made.faults = {1: float("inf")}
    try:
        made.train()
    finally:
        accelerator.state._mixed_precision = "no"
    assert accelerator.scaler.get_scale() == 512
    assert watch.norms[0] == pytest.approx(steps(made)[0]["grad_norm"], rel=1e-2)
    assert watch.norms[0] < 10
    assert [event.kind for event in callback.session.events] == ["scaler-skip"]
    assert weights(made.model).isfinite().all()


# Dynamo asks tensors behind a graph break (transformers' own) for .grad, and torch warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_trains(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # what Trainer sets must not outlive it
    watch = Watch()
    made, callback = equipped(
        mode, tmp_path, watch, "zclip", torch_compile=True, torch_compile_backend="eager"
    )
    made.train()
    bare = trainer(tmp_path)
    bare.train()
    assert callback.session.number == 4
    assert watch.norms[0] == pytest.approx(steps(bare)[0]["grad_norm"], rel=1e-4)
    assert watch.losses == pytest.approx([entry["loss"] for entry in steps(made)], rel=1e-4)
    names = callback.session.current_layout()[0].names
    assert "transformer.wte.weight" in names


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_and_a_scheduler_of_the_user_are_used(mode: str, tmp_path: Path) -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    made, callback = equipped(
        mode, tmp_path, "zclip", model=model, optimizers=(optimizer, scheduler)
    )
    made.train()
    assert callback.session.optimizers == (optimizer,)
    assert [steps(made)[i]["learning_rate"] for i in (0, -1)] == [0.05, 0.1]


# peft 0.21 asks for an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_lora_trains_and_names_its_matrices(mode: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA models need peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(gpt2(), config)
    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "adagc", model=model)
    made.faults = {1: float("nan")}
    made.train()
    names = callback.session.current_layout()[0].names
    assert len(names) == 4
    assert all("lora" in name for name in names)
    assert (callback.session.skipped, callback.session.updates) == (1, 3)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_in_between_is_not_seen(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, callback = equipped(
        mode, tmp_path, watch, "zclip", eval_strategy="steps", eval_steps=1, evaluate=text(4)
    )
    made.train()
    assert callback.session.number == 4
    assert watch.losses == pytest.approx([entry["loss"] for entry in steps(made)], abs=1e-4)
    evaluations = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert not any("grad_norm_clipped" in entry for entry in evaluations)


def test_metrics_are_in_the_history_of_a_callback(tmp_path: Path) -> None:
    made, callback = equipped("callback", tmp_path, "nonfinite-guard", "zclip")
    made.train()
    last = steps(made)[-1]
    assert last["grad_norm_clipped"] == callback.session.metrics()["grad_norm_clipped"]
    assert {"zclip/threshold", "zclip/clipped", "steps_skipped", "step_loss"} <= set(last)
    assert all(isinstance(value, (int, float)) for value in last.values())


@pytest.mark.parametrize("mode", MODES)
def test_tensorboard_has_metrics_only_with_the_trainer_in_hand(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    board = tmp_path / "board"
    changes: dict[str, Any] = {"report_to": "tensorboard"}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
    if hasattr(trainer(tmp_path).args, "logging_dir"):  # transformers 4
        changes["logging_dir"] = str(board)
    made, _ = equipped(mode, tmp_path, "nonfinite-guard", "zclip", **changes)
    made.train()
    read = events.EventAccumulator(str(board))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    ours = {"train/grad_norm_clipped", "train/steps_skipped", "train/zclip/threshold"}
    assert "train/loss" in tags
    assert ours <= tags if mode == "attach" else not ours & tags


def test_restoring_callback_states_leaves_the_callback_alone(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    equipped("callback", tmp_path, "zclip", **changes)[0].train()
    changes["restore_callback_states_from_checkpoint"] = True
    made, callback = equipped("callback", tmp_path, "zclip", **changes)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.session.number == 4


def test_a_callback_without_plugins_reports_only(tmp_path: Path) -> None:
    callback = StableKitCallback()
    made = trainer(tmp_path, callbacks=[callback], max_grad_norm=0.0)
    bare = trainer(tmp_path, max_grad_norm=0.0)
    made.train()
    bare.train()
    assert torch.equal(weights(made.model), weights(bare.model))
    assert math.isfinite(steps(made)[-1]["grad_norm_clipped"])
    assert callback.session.number == 4
