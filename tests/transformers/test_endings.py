"""What is left of a session when training is over: nothing that acts, and all that it knew."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

import stablekit
import stablekit_transformers
from stablekit.errors import AttachError, NonFiniteError
from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, Watch, equipped
from tests.transformers.tiny import gpt2, llama, steps, text, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAN = float("nan")
LOSSES = ("z-loss:weight=0.1", "soft-cap:cap=0.5", "error-norm-truncation:fraction=0.2")


def losses(folder: Path, model: PreTrainedModel, *callbacks: Any) -> list[float]:  # noqa: ANN401
    made = trainer(folder, model=model, callbacks=list(callbacks))
    made.train()
    return [entry["loss"] for entry in steps(made)]


@pytest.mark.parametrize("spec", [*LOSSES[:2], f"{LOSSES[2]},warmup_steps=1"])
def test_a_plain_trainer_after_it_trains_the_plain_model(spec: str, tmp_path: Path) -> None:
    model = llama()
    changed = losses(tmp_path, model, StableKitCallback(spec))
    assert "_loss_function" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())
    fresh = llama()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert losses(tmp_path, model) == losses(tmp_path, fresh)
    assert changed != losses(tmp_path, llama())


def test_a_second_callback_counts_a_term_once(tmp_path: Path) -> None:
    model = llama()
    losses(tmp_path, model, StableKitCallback(LOSSES[0]))
    fresh = llama()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    again = losses(tmp_path, model, StableKitCallback(LOSSES[0]))
    assert again == losses(tmp_path, fresh, StableKitCallback(LOSSES[0]))


@pytest.mark.parametrize("mode", MODES)
def test_after_training_the_optimizer_is_free_and_the_session_readable(
    mode: str, tmp_path: Path
) -> None:
    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "zclip", faults={1: NAN})
    made.train()
    with pytest.raises(AttachError, match="no session"):
        stablekit.session(made.optimizer)
    assert callback.session.metrics()["steps_skipped"] == 1
    assert [event.kind for event in callback.session.events] == ["nonfinite", "skip"]
    assert "4 steps, 3 updates, 1 skipped" in callback.session.summary()
    assert made.optimizer is not None
    assert "stablekit" not in made.optimizer.state_dict()


@pytest.mark.parametrize("mode", MODES)
def test_a_second_training_goes_on_where_plugins_were(mode: str, tmp_path: Path) -> None:
    """In two trainings as in one of a loop that knows of no trainings."""
    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "autoclip", faults={1: NAN})
    made.train()
    callback.session.track(scheduler=made.lr_scheduler)
    first = callback.session.state_dict()
    made.faults = {}
    made.train()
    second = callback.session.state_dict()
    assert (first["number"], second["number"]) == (4, 8)
    assert second["events"] == first["events"] != []
    grown = [one["plugins"]["autoclip"]["state"] for one in (first, second)]
    assert [len(state["history"]) for state in grown] == [3, 7]
    assert torch.equal(
        torch.as_tensor(grown[1]["history"][:3]), torch.as_tensor(grown[0]["history"])
    )
    assert list(callback.session.tracked) == ["scheduler"]


@pytest.mark.parametrize("mode", MODES)
def test_a_training_that_raised_goes_on_in_its_session(mode: str, tmp_path: Path) -> None:
    made, callback = equipped(mode, tmp_path, "nonfinite-guard:max_consecutive=1")
    made.faults = dict.fromkeys(range(4), NAN)
    with pytest.raises(NonFiniteError):
        made.train()
    first = callback.session
    made.faults = {}
    made.train()
    assert callback.session is first


@pytest.mark.parametrize("mode", MODES)
def test_detach_ends_it_for_good(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, callback = equipped(mode, tmp_path, watch, "adagc", LOSSES[0])
    callback.detach()
    made.train()
    bare = trainer(tmp_path)
    bare.train()
    assert torch.equal(weights(made.model), weights(bare.model))
    assert [set(entry) for entry in steps(made)] == [set(entry) for entry in steps(bare)]
    assert not watch.norms


@pytest.mark.parametrize("mode", MODES)
def test_detach_after_a_training_that_raised_gives_everything_back(
    mode: str, tmp_path: Path
) -> None:
    model = gpt2()
    made, callback = equipped(
        mode, tmp_path, "nonfinite-guard:max_consecutive=1", LOSSES[0], model=model
    )
    before = weights(model)
    made.faults = dict.fromkeys(range(4), NAN)
    with pytest.raises(NonFiniteError):
        made.train()
    callback.detach()
    callback.detach()
    assert torch.equal(weights(model), before)
    assert made.args.max_grad_norm == 1.0
    assert losses(tmp_path, model) == losses(tmp_path, gpt2())


def test_a_detached_trainer_can_be_attached_to_again(tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=text(8))
    stablekit_transformers.attach(made, "zclip").detach()
    callback = stablekit_transformers.attach(made, "adagc")
    made.train()
    assert list(callback.session.plugins) == ["adagc"]
    assert callback.session.number == 4
