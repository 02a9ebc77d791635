"""What a plugin may read of a step beside gradients: its metrics, and norms of other tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import stablekit
from stablekit import hookimpl
from stablekit.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Step


class Reader:
    """Calls a function at the end of every step."""

    name = "reader"

    def __init__(self, read: Callable[[Step], Any]) -> None:
        self.read = read
        self.seen: list[Any] = []

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        self.seen.append(self.read(step))


class Every:
    """Records a metric at every other step."""

    name = "every"

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        if step.number % 2:
            step.record("number", step.number)


def trained(*plugins: Any, steps: int = 2) -> nn.Linear:
    model = nn.Linear(3, 2)
    optimizer = stablekit.wrap(torch.optim.SGD(model.parameters(), lr=0.1), *plugins, model=model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model


def test_recorded_holds_the_metrics_of_this_step_only() -> None:
    reader = Reader(lambda step: set(step.recorded))
    trained(Every(), reader)
    common = {"grad_norm", "grad_norm_clipped", "steps_skipped"}
    assert reader.seen == [common | {"every/number"}, common]


def test_norms_of_weights_are_those_of_the_weights() -> None:
    reader = Reader(lambda step: step.norms_of(step.parameters))
    model = trained(reader)
    expected = torch.stack([param.detach().norm() for param in model.parameters()])
    torch.testing.assert_close(reader.seen[-1], expected)


def test_norms_of_a_restricted_plugin_are_those_of_its_parameters() -> None:
    reader = Reader(lambda step: step.norms_of([torch.full((2,), 2.0)]))
    trained(stablekit.only(reader, include=["bias"]))
    torch.testing.assert_close(reader.seen[-1], torch.tensor([8.0]).sqrt())


def test_a_missing_tensor_counts_as_zeros() -> None:
    reader = Reader(lambda step: step.norms_of([None, torch.ones(2)]).tolist())
    trained(reader)
    assert reader.seen[-1] == [0.0, pytest.approx(2**0.5)]


def test_as_many_tensors_as_parameters_are_asked_for() -> None:
    with pytest.raises(PluginError, match="expected 2 tensors, one a parameter, got 1"):
        trained(Reader(lambda step: step.norms_of([None])))


@pytest.mark.parametrize("device_mode", [False, True])
def test_events_name_tensors_by_position_in_the_order_given(device_mode: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    class Pointer:
        name = "pointer"

        @hookimpl
        def observe_gradients(self, step: Step) -> None:
            step.emit("pointed", when=step.ok, tensors=torch.tensor([2, 0, -1]))

    pointer = stablekit.only(Pointer(), exclude=["0.weight"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, pointer, model=model, device_mode=device_mode)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    session.metrics()
    assert session.events[0].tensors == ("1.bias", "0.bias")


def test_a_step_tells_whether_its_parameters_were_chosen_by_name() -> None:
    everything, named, left = (Reader(lambda step: step.named) for _ in range(3))
    named.name, left.name = "named", "left"
    trained(
        everything,
        stablekit.only(named, include="bias"),
        stablekit.only(left, exclude="bias"),
        steps=1,
    )
    assert [everything.seen, named.seen, left.seen] == [[False], [True], [False]]


def test_groups_and_states_are_those_of_the_parameters() -> None:
    seen = []

    class Look:
        name = "look"

        @hookimpl
        def after_update(self, step: Step) -> None:
            seen.append(([g["lr"] for g in step.groups], [s["step"].item() for s in step.states]))

    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
    optimizer = stablekit.wrap(torch.optim.AdamW(groups), Look())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert seen == [([0.5, 0.25], [1.0, 1.0])]
