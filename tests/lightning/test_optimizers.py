"""Which optimizers share a session, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")

from lightning.pytorch.strategies import SingleDeviceStrategy

import stablekit
from stablekit.errors import AttachError, IncompleteRoundError
from stablekit_lightning import StableKitCallback
from tests.lightning.modules import HOST_WARNINGS, ByHand, Listener, Regression, fit

if TYPE_CHECKING:
    from torch.optim import Optimizer

pytestmark = HOST_WARNINGS


def test_optimizers_that_step_together_share_one_norm_and_one_decision() -> None:
    callback = StableKitCallback("global-norm:max_norm=0.05", listener := Listener(), together=True)
    fit(ByHand(take_turns=False), callback)
    assert callback.session.number == 8
    assert len(callback.session.optimizers) == 2
    # Norms over all four parameters: those of a module that has one optimizer for them.
    alone = Listener()
    fit(Regression({1: 10.0}), StableKitCallback(alone), batches=1)
    assert listener.norms[0] == pytest.approx(alone.norms[0])
    assert callback.session.metrics()["grad_norm_clipped"] == pytest.approx(0.05, rel=1e-3)


def test_a_round_that_steps_only_one_of_two_is_an_error() -> None:
    with pytest.raises(IncompleteRoundError, match=r"number 1 .AdamW."):
        fit(ByHand(take_turns=False, forgets_one=True), StableKitCallback("zclip", together=True))


def test_optimizers_that_take_turns_have_a_session_and_losses_each() -> None:
    callback = StableKitCallback("global-norm", {"zclip": {"z_thresh": 3.0}}, together=False)
    trainer = fit(ByHand(take_turns=True), callback)
    assert [session.number for session in callback.sessions] == [4, 4]
    logged = trainer.logged_metrics
    assert logged["optimizer-1/step_loss"] > 3 * logged["optimizer-0/step_loss"]
    with pytest.raises(AttachError, match="expected one session, there are 2"):
        _ = callback.session


@pytest.mark.parametrize(
    ("together", "plugin", "message"),
    [
        (None, "zclip", "pass together=True if"),
        (False, Listener(), "give Listener by name or as a mapping"),
    ],
)
def test_nothing_is_guessed_about_two_optimizers(
    together: bool | None, plugin: object, message: str
) -> None:
    with pytest.raises(AttachError, match=message):
        fit(ByHand(take_turns=True), StableKitCallback(plugin, together=together))


def test_a_module_without_an_optimizer_is_refused() -> None:
    class Untrained(ByHand):
        def configure_optimizers(self) -> list[Optimizer]:
            return []

    with pytest.raises(AttachError, match="no optimizer to attach to"):
        fit(Untrained(take_turns=True), StableKitCallback("zclip"))


@pytest.mark.parametrize(
    ("algorithm", "instead"),
    [("norm", "global-norm:max_norm=0.5"), ("value", "clip-value:limit=0.5")],
)
def test_lightnings_own_clipping_next_to_a_clipper_is_an_error_that_names_the_plugin_to_use(
    algorithm: str, instead: str
) -> None:
    class KeepsIt(Regression):
        def configure_optimizers(self) -> Optimizer:
            self.made = super().configure_optimizers()
            return self.made

    module, callback = KeepsIt(), StableKitCallback("nonfinite-guard", "zclip")
    with pytest.raises(AttachError, match=instead):
        fit(module, callback, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    with pytest.raises(AttachError, match="no session"):
        stablekit.session(module.made)


def test_lightnings_own_clipping_acts_before_plugins_that_only_watch() -> None:
    listener = Listener()
    callback = StableKitCallback("nonfinite-guard", listener)
    fit(Regression({3: float("nan")}), callback, gradient_clip_val=0.05)
    assert callback.session.skipped == 1
    assert max(listener.norms[:3]) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DeepSpeedStrategy", "inside its own engine"), ("FSDPStrategy", "ModelParallelStrategy")],
)
def test_strategies_that_show_plugins_the_wrong_gradients_are_refused(
    name: str, reason: str
) -> None:
    # The real ones need a GPU to be made; what counts is the name.
    strategy = type(name, (SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(AttachError, match=reason):
        fit(Regression(), StableKitCallback("zclip"), strategy=strategy)
