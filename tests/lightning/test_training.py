"""What plugins see and do while Lightning trains, against plain loops of torch."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")

from lightning.pytorch.plugins import MixedPrecision
from torch.nn.utils import clip_grad_norm_

import stablekit
from stablekit.errors import NonFiniteError
from stablekit_lightning import StableKitCallback
from tests.lightning.modules import (
    HOST_WARNINGS,
    Listener,
    Regression,
    adamw,
    batch_loss,
    fit,
    network,
    weights_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.optim import Optimizer

pytestmark = HOST_WARNINGS


def by_hand(batches: int, *, accumulate: int = 1, max_norm: float = math.inf) -> torch.Tensor:
    """Return the weights that a plain loop with torch's own clipping arrives at."""
    net = network()
    optimizer = adamw(net.parameters())
    for batch in range(batches):
        (batch_loss(net, batch) / accumulate).backward()
        if (batch + 1) % accumulate == 0:
            clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(net)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_step_clips_its_own_gradients_never_those_of_the_batch_before(
    accumulate: int,
) -> None:
    module = Regression()
    callback = StableKitCallback("global-norm:max_norm=0.05")
    fit(module, callback, accumulate_grad_batches=accumulate)
    expected = by_hand(8, accumulate=accumulate, max_norm=0.05)
    torch.testing.assert_close(weights_of(module), expected)
    assert not torch.allclose(expected, by_hand(8, accumulate=accumulate))
    assert callback.session.number == 8 // accumulate


def test_a_nan_is_skipped_and_logged_by_name_where_it_ends_a_run_without_the_callback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = Regression({3: math.nan})
    fit(stock)
    assert weights_of(stock).isnan().all()

    module, callback = Regression({3: math.nan}), StableKitCallback("nonfinite-guard", "zclip")
    with caplog.at_level(logging.WARNING, logger="stablekit_lightning"):
        fit(module, callback)
    assert weights_of(module).isfinite().all()
    assert (callback.session.number, callback.session.skipped) == (8, 1)
    skip = next(event for event in callback.session.events if event.kind == "skip")
    assert skip.tensors == ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
    said = [r.message for r in caplog.records if r.name == "stablekit_lightning"]
    assert [line.partition(":")[0] for line in said] == ["step 4", "step 4"]
    assert "net.0.weight" in said[0]


def test_a_spike_moves_the_weights_no_further_than_the_clipper_allows() -> None:
    module, listener = Regression({6: 1e6}), Listener()
    callback = StableKitCallback("zclip:max_grad_norm=None,warmup_steps=5", listener)
    fit(module, callback, batches=7)
    assert listener.norms[-1] > 1e5
    assert callback.session.metrics()["grad_norm_clipped"] < 2 * max(listener.norms[:6])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_has_the_mean_loss_of_its_micro_batches(accumulate: int) -> None:
    module, listener = (
        Regression(optimizer=lambda params: torch.optim.SGD(params, lr=0.0)),
        Listener(),
    )
    fit(module, StableKitCallback(listener), accumulate_grad_batches=accumulate)
    losses = [batch_loss(network(), batch).item() for batch in range(8)]
    groups = [losses[i : i + accumulate] for i in range(0, 8, accumulate)]
    assert listener.losses == pytest.approx([sum(group) / accumulate for group in groups])


def test_bf16_mixed_precision_trains_with_clipping_and_guard() -> None:
    module = Regression({2: math.nan})
    callback = StableKitCallback("nonfinite-guard", "global-norm:max_norm=0.05")
    fit(module, callback, precision="bf16-mixed")
    assert weights_of(module).isfinite().all()
    assert callback.session.skipped == 1
    assert callback.session.metrics()["grad_norm_clipped"] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scale_norms_and_losses_are_the_true_ones(fused: bool) -> None:
    def optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(params, lr=0.01, fused=fused)

    def run(precision: MixedPrecision) -> Listener:
        listener = Listener()
        module = Regression(optimizer=optimizer)
        fit(module, StableKitCallback(listener), plugins=[precision])
        return listener

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = run(MixedPrecision("16-mixed", "cpu", scaler))
    true = run(MixedPrecision("bf16-mixed", "cpu"))
    assert scaled.losses == pytest.approx(true.losses, rel=0.05)
    assert scaled.norms == pytest.approx(true.norms, rel=0.05)


def test_statistics_move_once_a_step_when_lbfgs_evaluates_the_closure_many_times() -> None:
    def lbfgs(params: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=5)

    listener = Listener()
    callback = StableKitCallback("nonfinite-guard", "autoclip:percentile=50", listener)
    module = Regression({2: math.nan}, optimizer=lbfgs)
    fit(module, callback, batches=4)
    assert callback.session.number == 4
    assert callback.session.skipped == 1
    assert len(callback.session.state_dict()["plugins"]["autoclip"]["state"]["history"]) == 3
    assert weights_of(module).isfinite().all()


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")  # that is what it tests
def test_a_batch_without_loss_is_a_step_without_gradients() -> None:
    class Skips(Regression):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    listener = Listener()
    fit(Skips(), StableKitCallback("zclip", listener), batches=3)
    assert listener.norms[1] == 0
    assert math.isnan(listener.losses[1])


def test_the_guard_ends_a_fit_in_which_every_step_is_bad_and_the_optimizer_is_free() -> None:
    class KeepsIt(Regression):
        def configure_optimizers(self) -> Optimizer:
            self.made = super().configure_optimizers()
            return self.made

    module = KeepsIt(dict.fromkeys(range(8), math.nan))
    callback = StableKitCallback("nonfinite-guard:max_consecutive=3")
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        fit(module, callback)
    with pytest.raises(stablekit.errors.AttachError, match="no session"):
        stablekit.session(module.made)
    assert callback.session.skipped >= 3


def test_a_dry_run_changes_nothing() -> None:
    module = Regression()
    callback = StableKitCallback("global-norm:max_norm=0.01", dry_run=True)
    fit(module, callback)
    torch.testing.assert_close(weights_of(module), by_hand(8), rtol=0, atol=0)
    assert callback.session.metrics()["global-norm/clipped"] == 1


def test_a_second_fit_starts_afresh_with_plugins_given_as_objects_too() -> None:
    callback = StableKitCallback(stablekit.create("zclip"), "nonfinite-guard")
    states = []
    for _ in range(2):
        fit(Regression({1: math.nan}), callback)
        states.append(callback.session.state_dict())
    assert states[0] == states[1]
    assert states[0]["number"] == 8


def test_the_callback_takes_every_keyword_of_attach() -> None:
    def keywords(function: Callable[..., object]) -> dict[str, object]:
        found = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}

    ours, attach = keywords(StableKitCallback), keywords(stablekit.attach)
    assert ours.pop("together") is None
    assert attach.pop("model") is None
    assert ours == attach
