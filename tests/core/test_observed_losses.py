"""Losses belong to the step that follows them, and events to what a checkpoint can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import stablekit
from stablekit import hookimpl


def test_losses_of_steps_that_a_scaler_left_out_do_not_count_for_the_next() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session = stablekit.attach(optimizer, "global-norm")
    seen = []
    for number in range(5):
        optimizer.zero_grad()
        scaler.scale(weight.square().sum()).backward()
        if number < 3:
            assert weight.grad is not None
            weight.grad.fill_(torch.inf)
        session.observe(loss=100.0 if number < 3 else 2.0)
        scaler.step(optimizer)
        scaler.update()
        seen.append(session.metrics().get("loss"))
    assert seen == [None, None, None, 2.0, 2.0]


def test_losses_of_micro_batches_are_averaged_whether_observed_before_or_after_backward() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    session = stablekit.attach(optimizer, "global-norm")
    for is_before in (True, False, True):
        optimizer.zero_grad()
        for loss in (1.0, 2.0, 6.0):
            if is_before:
                session.observe(loss=loss)
            weight.square().sum().backward()
            if not is_before:
                session.observe(loss=loss)
        optimizer.step()
        assert session.metrics()["loss"] == 3.0


def test_what_numpy_calls_numbers_and_text_is_saved_as_plain_values(tmp_path: Any) -> None:
    class Teller:
        name = "teller"

        @hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            step.emit("told", a=np.float32(1.5), b=np.float64(2.5), c=np.int64(3), d=np.str_("x"))

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = stablekit.wrap(torch.optim.SGD([weight], lr=0.0), Teller())
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    (event,) = saved["stablekit"]["events"]
    assert event["data"] == {"a": 1.5, "b": 2.5, "c": 3, "d": "x"}


def test_plugins_hear_of_events_in_the_order_in_which_they_happened() -> None:
    heard = []

    class Answering:
        name = "answering"

        @hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            step.emit("cause")

        @hookimpl
        def on_event(self, event: stablekit.Event, step: stablekit.Step) -> None:
            if event.kind == "cause":
                step.emit("effect")

    class Listener:
        name = "listener"

        @hookimpl
        def on_event(self, event: stablekit.Event) -> None:
            heard.append(event.kind)

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    stablekit.wrap(torch.optim.SGD([weight], lr=0.0), Answering(), Listener()).step()
    assert heard == ["cause", "effect"]
