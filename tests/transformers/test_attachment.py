"""When the callback attaches, what becomes of Trainer's own clipping, and what is refused."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

import stablekit
import stablekit_transformers
from stablekit.errors import AttachError, NonFiniteError
from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, Watch, equipped
from tests.transformers.tiny import gpt2, steps, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

    from stablekit import Step


@pytest.mark.parametrize("mode", MODES)
def test_one_line_attaches_to_the_torch_optimizer(mode: str, tmp_path: Path) -> None:
    seen = []

    class Look:
        name = "look"

        @stablekit.hookimpl
        def observe_gradients(self, step: Step) -> None:
            seen.append(stablekit.session(made.optimizer))

    made, callback = equipped(mode, tmp_path, "nonfinite-guard", "zclip", Look())
    made.train()
    assert list(callback.session.plugins) == ["nonfinite-guard", "zclip", "look"]
    assert type(callback.session.optimizers[0]) is torch.optim.AdamW
    assert seen == [callback.session] * 4
    assert callback.session.number == 4


@pytest.mark.parametrize("mode", MODES)
def test_plugins_see_gradients_that_trainer_has_not_clipped(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, _ = equipped(mode, tmp_path, watch, "zclip")
    made.train()
    bare = trainer(tmp_path, max_grad_norm=1.0)
    bare.train()
    assert watch.norms[0] > 2
    assert watch.norms[0] == pytest.approx(steps(bare)[0]["grad_norm"], rel=1e-5)
    assert steps(made)[0]["grad_norm"] == pytest.approx(watch.norms[0], rel=1e-5)
    assert steps(made)[0]["grad_norm_clipped"] == pytest.approx(1.0, rel=1e-5)


def test_max_grad_norm_is_zero_while_training_and_given_back(tmp_path: Path) -> None:
    seen = []

    class Look:
        name = "look"

        @stablekit.hookimpl
        def observe_gradients(self, step: Step) -> None:
            seen.append(made.args.max_grad_norm)

    made, _ = equipped("callback", tmp_path, Look(), "zclip", max_grad_norm=0.7)
    made.train()
    assert seen == [0.0] * 4
    assert made.args.max_grad_norm == 0.7


def test_max_grad_norm_is_given_back_after_a_training_that_raised(tmp_path: Path) -> None:
    made, _ = equipped("callback", tmp_path, "nonfinite-guard:max_consecutive=1", "zclip")
    made.faults = dict.fromkeys(range(4), float("nan"))
    with pytest.raises(NonFiniteError):
        made.train()
    made.faults = {}
    made.train()
    assert made.args.max_grad_norm == 1.0


def test_with_the_trainer_in_hand_max_grad_norm_is_not_touched(tmp_path: Path) -> None:
    made, callback = equipped("attach", tmp_path, "zclip")
    made.train()
    assert made.args.max_grad_norm == 1.0
    assert callback.session.metrics()["zclip/threshold"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_clipper_training_is_clipped_as_before(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, callback = equipped(mode, tmp_path, watch, max_grad_norm=0.5)
    bare = trainer(tmp_path, max_grad_norm=0.5)
    made.train()
    bare.train()
    assert list(callback.session.plugins) == ["watch", "global-norm"]
    assert watch.norms[0] > 2
    torch.testing.assert_close(weights(made.model), weights(bare.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_dry_run_changes_nothing(mode: str, tmp_path: Path) -> None:
    made, callback = equipped(mode, tmp_path, "zclip", options={"dry_run": True})
    bare = trainer(tmp_path)
    made.train()
    bare.train()
    assert torch.equal(weights(made.model), weights(bare.model))
    assert callback.session.number == 4


def test_what_becomes_of_clipping_and_what_a_callback_cannot_do_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = equipped("callback", tmp_path, "zclip")
    with caplog.at_level(logging.WARNING, "stablekit_transformers"):
        made.train()
        made.train()
    told = [r.getMessage() for r in caplog.records if r.name == "stablekit_transformers"]
    assert len(told) == 2
    assert "max_grad_norm=1 is not applied" in told[0]
    assert "attach(trainer" in told[1]


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_a_step_is_what_trainer_logs(mode: str, tmp_path: Path) -> None:
    watch = Watch()
    made, _ = equipped(mode, tmp_path, watch, logging_nan_inf_filter=False)
    made.train()
    assert watch.losses == pytest.approx([entry["loss"] for entry in steps(made)], abs=1e-4)
    assert [entry["step_loss"] for entry in steps(made)] == pytest.approx(watch.losses)


def test_with_the_trainer_in_hand_losses_add_up_over_micro_batches(tmp_path: Path) -> None:
    watch = Watch()
    made, _ = equipped("attach", tmp_path, watch, gradient_accumulation_steps=3)
    made.train()
    assert watch.losses == pytest.approx([entry["loss"] for entry in steps(made)], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_optimizer_gets_a_new_session_without_memory(mode: str, tmp_path: Path) -> None:
    guard: Any = stablekit.create("nonfinite-guard")
    made, callback = equipped(mode, tmp_path, guard, "adagc", "zclip", faults={1: float("nan")})
    torch.manual_seed(1)
    made.train()
    first, trained = callback.session, weights(made.model)
    fresh = gpt2()
    made.model = made.model_wrapped = fresh
    made.optimizer = made.lr_scheduler = None
    torch.manual_seed(1)
    made.train()
    assert callback.session is not first
    assert guard.state_dict() == {"in_a_row": 0, "total": 1}
    assert callback.session.plugins["nonfinite-guard"] is guard
    assert torch.equal(weights(fresh), trained)


@pytest.mark.parametrize("mode", MODES)
def test_a_smaller_batch_is_tried_in_the_same_session(mode: str, tmp_path: Path) -> None:
    made, callback = equipped(
        mode, tmp_path, "zclip", auto_find_batch_size=True, per_device_train_batch_size=3
    )
    limit = made.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return limit(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    made.train()
    assert made.state.global_step == 4
    assert callback.session.number == 4
    assert made.args.max_grad_norm == 1.0


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[StableKitCallback("zclip"), StableKitCallback("adagc")])
    with pytest.raises(AttachError, match="list all plugins in one StableKitCallback"):
        made.train()


def test_attaching_twice_to_a_trainer_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    stablekit_transformers.attach(made, "zclip")
    with pytest.raises(AttachError, match="has a StableKitCallback already"):
        stablekit_transformers.attach(made, "adagc")


def test_an_optimizer_that_has_a_session_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = stablekit.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "zclip")
    made, _ = equipped("callback", tmp_path, "adagc", model=model, optimizers=(optimizer, None))
    with pytest.raises(AttachError, match="has a session already, with zclip"):
        made.train()


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("zclop", "did you mean 'zclip'"),
        ("zclip:z_tresh=3.0", "did you mean z_thresh"),
        ({"zclip": {"alpha": 2.0, "include": "*"}}, "alpha must"),
        (["adagc", ["zclop"]], "did you mean 'zclip'"),
    ],
)
def test_a_misspelt_plugin_is_refused_before_training(spec: Any, error: str) -> None:  # noqa: ANN401
    with pytest.raises((ValueError, TypeError), match=error):
        StableKitCallback(spec)


def test_every_form_of_a_plugin_is_taken_by_the_callback(tmp_path: Path) -> None:
    specs = [
        "recommended",
        {"adagc": {"exclude": "*.bias"}},
        stablekit.only("agc", exclude="*.bias"),
    ]
    made, callback = equipped("callback", tmp_path, specs, Watch())
    made.train()
    assert list(callback.session.plugins) == ["nonfinite-guard", "zclip", "adagc", "agc", "watch"]


def test_before_training_there_is_no_session() -> None:
    with pytest.raises(AttachError, match="before training begins"):
        _ = StableKitCallback("zclip").session
