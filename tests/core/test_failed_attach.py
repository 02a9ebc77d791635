"""An attach() that a plugin refuses leaves optimizer and model as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import AttachError, PluginError, StablekitWarning

if TYPE_CHECKING:
    from stablekit import Session


@final
class Listener:
    """Hangs a hook on the model, and may fail right after, or when it is to take the hook away."""

    def __init__(self, name: str, *, fails: bool = False, clings: bool = False) -> None:
        """Hold no hook."""
        self.name = name
        self.fails = fails
        self.clings = clings
        self.log: list[str] = []

    @stablekit.hookimpl
    def on_attach(self, session: Session) -> None:
        """Hang the hook."""
        assert session.model is not None
        self.log.append("attach")
        self.handle = session.model.register_forward_hook(lambda *_: None)
        if self.fails:
            raise AttachError("no, thank you")

    @stablekit.hookimpl
    def on_detach(self) -> None:
        """Take it away."""
        self.log.append("detach")
        if self.clings:
            raise RuntimeError("it clings")
        self.handle.remove()


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_plugins_that_were_attached_and_the_one_that_failed_are_detached() -> None:
    model, optimizer = training()
    chain = [Listener("a"), Listener("b", fails=True), Listener("c")]
    with pytest.raises(AttachError, match="no, thank you"):
        stablekit.attach(optimizer, *chain, model=model)
    assert [one.log for one in chain] == [["attach", "detach"], ["attach", "detach"], []]
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    stablekit.attach(optimizer, Listener("d"), model=model).detach()


def test_what_the_catalogue_hung_on_the_model_is_gone_when_a_later_plugin_raises() -> None:
    model, optimizer = training()
    blocks = nn.Sequential(model)
    with pytest.raises(AttachError, match="matches no module"):
        stablekit.attach(
            optimizer,
            "activation-monitor",
            "residual-monitor:blocks=*",
            "logits-monitor:module=nowhere",
            model=blocks,
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in blocks.modules())


def test_a_plugin_that_cannot_take_back_is_named_and_the_others_still_do() -> None:
    model, optimizer = training()
    chain = [Listener("a", clings=True), Listener("b"), Listener("c", fails=True)]
    with (
        pytest.raises(AttachError, match="no, thank you"),
        pytest.warns(StablekitWarning, match=r"'a' could not take back .* it clings"),
    ):
        stablekit.attach(optimizer, *chain, model=model)
    assert len(model._forward_hooks) == 1
    assert chain[1].log == ["attach", "detach"]


def test_an_on_detach_that_needs_what_on_attach_never_made_does_not_hide_the_reason() -> None:
    @final
    class Halfway:
        """Fails before it has made what it is to let go."""

        name = "halfway"

        @stablekit.hookimpl
        def on_attach(self) -> None:
            """Fail."""
            raise ValueError("no room")

        @stablekit.hookimpl
        def on_detach(self) -> None:
            """Let go of what is not there."""
            raise AttributeError("handle")

    _, optimizer = training()
    with (
        pytest.raises(PluginError, match="no room"),
        pytest.warns(StablekitWarning, match="'halfway' could not take back"),
    ):
        stablekit.attach(optimizer, Halfway())
