"""What travels in a Lightning checkpoint and comes back, bit for bit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")

from lightning.pytorch.callbacks import ModelCheckpoint

import stablekit
from stablekit.errors import StateError, StateWarning
from stablekit_lightning import StableKitCallback
from tests.lightning.modules import (
    HOST_WARNINGS,
    ByHand,
    Regression,
    fit,
    network,
    numbers,
    weights_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import Trainer

# Batches are numbered within an epoch; nothing is read from a file that Lightning did not write.
FAULTS = {9: math.nan, 14: 1e5, 25: math.nan, 33: 1e5}
PLUGINS = ("nonfinite-guard", "adagc:warmup_steps=10", "autoclip:percentile=70", "agc")
pytestmark = HOST_WARNINGS


class Counted(Regression):
    """Takes the batch with the number of the step, so that a resumed run sees what follows."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        return super().training_step(torch.tensor(self.global_step), batch_idx)


def train(
    steps: int, *plugins: str, ckpt_path: Path | None = None
) -> tuple[Trainer, StableKitCallback]:
    """Fit up to a step, with a new Trainer, module and callback."""
    callback = StableKitCallback(*plugins)
    path = str(ckpt_path) if ckpt_path else None
    trainer = fit(
        Counted(FAULTS), callback, batches=50, max_steps=steps, max_epochs=-1, ckpt_path=path
    )
    return trainer, callback


def saved_by(trainer: Trainer, folder: Path, name: str = "run.ckpt") -> Path:
    """Write a checkpoint as a user would after ``fit``."""
    trainer.save_checkpoint(folder / name)
    return folder / name


def contents(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, in plain values and tensors only."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def bits(value: Any) -> Any:  # noqa: ANN401 - what a checkpoint holds
    """Return a value in which tensors are bytes and NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list) else repr(value)


def test_resuming_at_step_17_gives_the_bits_of_40_steps_without_a_break(tmp_path: Path) -> None:
    straight, whole = train(40, *PLUGINS)
    broken, _ = train(17, *PLUGINS)
    resumed, rest = train(40, *PLUGINS, ckpt_path=saved_by(broken, tmp_path))
    assert whole.session.skipped == 2
    assert rest.session.events == whole.session.events
    ours = contents(saved_by(resumed, tmp_path, "resumed.ckpt"))
    expected = contents(saved_by(straight, tmp_path, "straight.ckpt"))
    for part in ("state_dict", "optimizer_states", "callbacks", "global_step"):
        assert bits(ours[part]) == bits(expected[part])


def test_a_checkpoint_written_during_fit_holds_the_state_once(tmp_path: Path) -> None:
    stable = StableKitCallback("zclip", "nonfinite-guard")
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(Regression(), stable, every, batches=10, enable_checkpointing=True)
    checkpoint = contents(tmp_path / "step=5.ckpt")
    (state,) = checkpoint["callbacks"]["stablekit"]["sessions"]
    assert state["number"] == 5
    assert set(checkpoint["optimizer_states"][0]) == {"state", "param_groups"}


def test_a_checkpoint_without_plugin_state_resumes_with_a_warning(tmp_path: Path) -> None:
    bare = fit(Counted(), batches=50, max_steps=5, max_epochs=-1)
    with pytest.warns(StateWarning, match="plugins start afresh"):
        trainer, callback = train(10, "zclip", ckpt_path=saved_by(bare, tmp_path))
    assert callback.session.number == 5
    assert trainer.global_step == 10


def test_a_checkpoint_resumes_without_the_callback_and_lightning_says_what_is_missing(
    tmp_path: Path,
) -> None:
    trainer, _ = train(5, "zclip")
    path = str(saved_by(trainer, tmp_path))
    with pytest.warns(UserWarning, match="Please add the following callbacks: ..stablekit"):
        resumed = fit(Counted(), batches=50, max_steps=10, max_epochs=-1, ckpt_path=path)
    assert resumed.global_step == 10


def test_a_plugin_added_since_starts_afresh_and_is_named(tmp_path: Path) -> None:
    trainer, _ = train(5, "zclip")
    with pytest.warns(StateWarning, match="start afresh, not in the checkpoint: nonfinite-guard"):
        _, callback = train(6, "zclip", "nonfinite-guard", ckpt_path=saved_by(trainer, tmp_path))
    assert callback.session.number == 6


def test_a_checkpoint_of_two_sessions_is_not_squeezed_into_one(tmp_path: Path) -> None:
    pair = StableKitCallback("zclip", together=False)
    path = str(saved_by(fit(ByHand(take_turns=True), pair, max_epochs=1), tmp_path))
    one = StableKitCallback("zclip", together=True)
    with pytest.raises(StateError, match="2 sessions were saved, the module now has 1"):
        fit(ByHand(take_turns=False), one, max_epochs=2, ckpt_path=path)


def test_the_saved_state_continues_in_a_plain_loop(tmp_path: Path) -> None:
    trainer, callback = train(5, "zclip")
    checkpoint = contents(saved_by(trainer, tmp_path))
    optimizer = torch.optim.AdamW(network().parameters())
    session = stablekit.attach(optimizer, "zclip")
    session.load_state_dict(checkpoint["callbacks"]["stablekit"]["sessions"][0])
    assert session.state_dict() == callback.session.state_dict()


def test_a_state_loaded_for_validation_does_not_reach_the_next_fit(tmp_path: Path) -> None:
    class Validated(Counted):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            return

    trainer, callback = train(5, "zclip")
    path = saved_by(trainer, tmp_path)
    trainer.validate(Validated(), numbers(1), ckpt_path=path, verbose=False)
    assert callback.session.number == 5
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(Counted(), numbers(50))
    assert callback.session.number == 3
    assert weights_of(trainer.lightning_module).isfinite().all()
