"""One process: what the loop does with the accelerator reaches the session, and the other way."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import stablekit
import stablekit_accelerate
from stablekit.errors import AttachError
from tests.accelerate.loops import (
    NAN,
    Notebook,
    Prepared,
    Watch,
    adamw,
    loss_of,
    network,
    prepared,
    sgd,
    train,
    weights,
)

ORDERS = ("attach", "prepare")


def plain(accelerator: Any, optimizer: Any, *plugins: Any, **options: Any) -> stablekit.Session:  # noqa: ANN401
    return stablekit.attach(optimizer, *plugins, **options)


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("attach", [plain, stablekit_accelerate.attach])
def test_plugins_act_whether_attached_before_or_after_prepare(attach: Any, first: str) -> None:  # noqa: ANN401
    kit = prepared("nonfinite-guard", "global-norm:max_norm=0.1", attach=attach, first=first)
    before = weights(kit.model)
    train(kit, NAN)
    assert torch.equal(weights(kit.model), before)
    train(kit, 1.0)
    assert kit.session.skipped == 1
    assert kit.session.metrics()["grad_norm_clipped"] == pytest.approx(0.1, rel=1e-3)
    assert stablekit.session(kit.optimizer) is kit.session
    assert kit.session.events[0].tensors[0] == "0.weight"


@pytest.mark.parametrize("first", ORDERS)
def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches(first: str) -> None:
    watch, twin = Watch(), network()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    kit = prepared(watch, accelerator=accelerator, first=first)
    train(kit, 1.0, 2.0, 3.0)
    expected = [loss_of(twin, i, gain).item() for i, gain in enumerate((1.0, 2.0, 3.0))]
    assert watch.losses == [pytest.approx(sum(expected) / 3)]
    assert kit.session.number == 1


def test_what_backward_begins_at_need_not_be_a_scalar() -> None:
    watch = Watch()
    kit = prepared(watch)
    kit.accelerator.backward(kit.model(torch.ones(2, 4)), gradient=torch.ones(2, 1))
    kit.optimizer.step()
    assert watch.losses == [None]


def test_trackers_get_the_metrics_with_the_number_of_the_step() -> None:
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=[notebook])
    accelerator.init_trackers("run")
    kit = prepared("zclip", accelerator=accelerator, log_every=2)
    train(kit, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert [step for step, _ in notebook.pages] == [2, 4]
    assert {"grad_norm", "zclip/threshold", "step_loss"} <= set(notebook.pages[0][1])


def test_events_are_in_the_log_until_there_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    kit = prepared("nonfinite-guard:max_consecutive=100")
    train(kit, *[NAN] * 30)
    lines = [record.message for record in caplog.records]
    assert "step 1: skip (nonfinite-guard)" in lines[1]
    assert len(lines) == 21
    assert "session.events" in lines[-1]


def test_nothing_is_logged_if_the_user_logs() -> None:
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=[notebook])
    accelerator.init_trackers("run")
    train(prepared("zclip", accelerator=accelerator, log_metrics=False), 1.0, NAN)
    assert notebook.pages == []


def test_detach_leaves_the_accelerator_as_it_was() -> None:
    accelerator = Accelerator(cpu=True)
    kit = prepared("nonfinite-guard", accelerator=accelerator)
    hooks = [accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook]
    train(kit, NAN)
    assert {"backward", "clip_grad_norm_"} <= set(vars(accelerator))
    assert accelerator.optimizer_step_was_skipped
    assert all(hooks)
    kit.session.detach()
    assert set(vars(accelerator)).isdisjoint({"backward", "clip_grad_norm_"})
    assert not accelerator.optimizer_step_was_skipped
    assert not any(hooks)
    twin = prepared(accelerator=Accelerator(cpu=True), attach=unattached)
    train(twin, 1.0, limit=0.1)
    kit.model.load_state_dict(network().state_dict())
    fresh = Prepared(accelerator, kit.model, accelerator.prepare(adamw(kit.model)), kit.session)
    train(fresh, 1.0, limit=0.1)
    assert torch.equal(weights(kit.model), weights(twin.model))


def unattached(*_: Any, **__: Any) -> Any:  # noqa: ANN401 - in place of a session
    return SimpleNamespace()


def test_detach_puts_back_what_somebody_else_had_put_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator, calls = Accelerator(cpu=True), []
    original = accelerator.backward

    def theirs(loss: torch.Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - as Accelerator's
        calls.append(loss.item())
        original(loss, **kwargs)

    monkeypatch.setattr(accelerator, "backward", theirs)
    kit = prepared(Watch(), accelerator=accelerator)
    train(kit, 1.0)
    assert len(calls) == 1
    kit.session.detach()
    assert accelerator.backward is theirs


def test_two_sessions_that_take_losses_of_one_accelerator_are_refused() -> None:
    kit = prepared(Watch())
    other = kit.accelerator.prepare(adamw(network()))
    with pytest.raises(AttachError, match="observe_loss=False"):
        stablekit_accelerate.attach(kit.accelerator, other, "zclip")


def test_two_sessions_clip_each_its_own() -> None:
    watches = Watch(), Watch()
    accelerator = Accelerator(cpu=True)
    kits = [prepared(w, accelerator=accelerator, observe_loss=False) for w in watches]
    for i, kit in enumerate(kits):
        kit.session.observe(loss=float(i))
        train(kit, 10.0, limit=0.1 * (i + 1))
        assert kit.session.metrics()["grad_norm_clipped"] == pytest.approx(0.1 * (i + 1), rel=1e-3)
    assert [watch.losses for watch in watches] == [[0.0], [1.0]]
    kits[0].session.detach()
    train(kits[1], 10.0, limit=0.3)
    assert kits[1].session.metrics()["grad_norm_clipped"] == pytest.approx(0.3, rel=1e-3)
    kits[1].session.detach()
    assert "backward" not in vars(accelerator)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("DEEPSPEED", "DeepSpeed clips"), ("MEGATRON_LM", "Megatron-LM"), ("FSDP", "FSDP1")],
)
def test_engines_that_step_by_themselves_are_refused(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", SimpleNamespace(value=kind))
    monkeypatch.setattr(type(accelerator), "is_fsdp2", False)
    with pytest.raises(AttachError, match=f"{reason}.*Supported are one process, DDP and FSDP2"):
        stablekit_accelerate.attach(accelerator, adamw(network()), "zclip")
    assert "backward" not in vars(accelerator)


def test_the_arguments_in_the_wrong_order_are_named() -> None:
    with pytest.raises(TypeError, match="expected an Accelerator and then the optimizer"):
        stablekit_accelerate.attach(adamw(network()), Accelerator(cpu=True))


def test_several_optimizers_that_step_together_are_one_session(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator, model = Accelerator(cpu=True), network()
    parts = [sgd(model[0]), adamw(model[2])]  # type: ignore[index]  # Sequential
    model, *optimizers = accelerator.prepare(model, *parts)
    session = stablekit_accelerate.attach(accelerator, optimizers, "nonfinite-guard", model=model)
    for gain, skipped in ((10.0, False), (NAN, True), (10.0, False)):
        accelerator.backward(loss_of(model, 0, gain))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
        assert [one.step_was_skipped for one in optimizers] == [skipped] * 2
        model.zero_grad()
    assert session.metrics()["grad_norm_clipped"] == pytest.approx(0.1, rel=1e-3)
    assert session.skipped == 1
    assert logging.getLogger("stablekit_accelerate").name in {r.name for r in caplog.records}
