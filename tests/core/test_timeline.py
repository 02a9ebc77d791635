"""One step fires the hooks of ``hookspecs``, in its order, for the plugins in theirs."""

from __future__ import annotations

import pytest
import torch

import stablekit
from stablekit import Step, hookimpl
from stablekit.errors import HookError
from tests.core.oracles import BeforeUpdate, Diary, backward, set_gradients, small_model


def test_hooks_of_one_step_fire_in_the_documented_order() -> None:
    pages: list[str] = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Edits:
        name = "edits"

        @hookimpl
        def before_update(self, step: Step) -> None:
            pages.append("before_update")

    session = stablekit.attach(optimizer, Diary(pages=pages), Edits())
    backward(model)
    optimizer.step()
    session.detach()
    assert pages == [
        "on_attach",
        "observe_gradients",
        "transform_gradients",
        "before_update",
        "after_update",
        "on_step_end",
        "on_metrics",
        "on_detach",
    ]


def test_skipped_step_fires_on_skip_instead_of_transforms_and_updates() -> None:
    diary = Diary()
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, "nonfinite-guard", diary, BeforeUpdate())
    set_gradients(model.parameters(), float("nan"))
    optimizer.step()
    assert diary.pages == [
        "on_attach",
        "on_event:nonfinite",
        "observe_gradients",
        "on_event:skip",
        "on_skip",
        "on_step_end",
        "on_metrics",
    ]


def test_plugins_act_in_the_listed_order_at_every_hook() -> None:
    pages: list[str] = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, *(Diary(name, pages) for name in ("b", "a", "c")))
    backward(model)
    optimizer.step()
    for hook in ("on_attach", "observe_gradients", "transform_gradients", "after_update"):
        assert [page for page in pages if page.endswith(hook)] == [f"{n}.{hook}" for n in "bac"]


def test_first_and_last_go_before_and_after_the_listed_order() -> None:
    order: list[str] = []

    class First:
        name = "first"

        @hookimpl(tryfirst=True)
        def after_update(self, step: Step) -> None:
            order.append(self.name)

    class Last:
        name = "last"

        @hookimpl(trylast=True)
        def after_update(self) -> None:
            order.append(self.name)

    class Plain:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def after_update(self, step: Step) -> None:
            order.append(self.name)

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, Last(), Plain("one"), Plain("two"), First())
    backward(model)
    optimizer.step()
    assert order == ["first", "one", "two", "last"]


def test_number_counts_every_step_and_updates_only_applied_ones() -> None:
    diary = Diary()
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    session = stablekit.attach(optimizer, "nonfinite-guard", diary)
    for bad in (False, True, True, False):
        backward(model)
        if bad:
            set_gradients(model.parameters(), float("nan"), 1.0)
        optimizer.step()
    assert diary.steps == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert (session.number, session.updates, session.skipped) == (4, 2, 2)
    assert session.metrics()["steps_skipped"] == 2.0


def test_misspelt_hook_is_an_error_that_suggests_the_right_one() -> None:
    class Misspelt:
        name = "misspelt"

        @hookimpl
        def transform_gradient(self, step: Step) -> None: ...

    optimizer = torch.optim.SGD([torch.zeros(2)])
    with pytest.raises(HookError, match="did you mean transform_gradients"):
        stablekit.attach(optimizer, Misspelt())
    assert not optimizer._optimizer_step_pre_hooks


def test_hook_with_an_argument_it_cannot_be_given_is_an_error() -> None:
    class Greedy:
        name = "greedy"

        @hookimpl
        def after_update(self, step: Step, model: object) -> None: ...

    with pytest.raises(HookError, match="greedy"):
        stablekit.attach(torch.optim.SGD([torch.zeros(2)]), Greedy())


def test_skip_outside_of_observe_gradients_is_refused() -> None:
    class Late:
        name = "late"

        @hookimpl
        def transform_gradients(self, step: Step) -> None:
            step.skip("too late")

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, Late())
    backward(model)
    with pytest.raises(HookError, match=r"observe_gradients only; plugin 'late'"):
        optimizer.step()


def test_gradients_are_read_only_outside_of_transform_gradients() -> None:
    class Writer:
        name = "writer"

        @hookimpl
        def observe_gradients(self, step: Step) -> None:
            step.gradients.scale_(torch.tensor(0.5))

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stablekit.attach(optimizer, Writer())
    backward(model)
    with pytest.raises(HookError, match="transform_gradients only"):
        optimizer.step()


def test_events_speak_under_the_name_of_the_plugin_that_hears_them() -> None:
    class Answers:
        name = "answers"

        @hookimpl
        def on_event(self, event: stablekit.Event, step: Step) -> None:
            step.record("heard", 1.0)

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "nonfinite-guard", Answers())
    set_gradients(model.parameters(), float("nan"))
    optimizer.step()
    assert session.metrics()["answers/heard"] == 1.0
