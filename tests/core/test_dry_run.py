"""A dry run decides and records as a live one and changes no bit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, optim
from torch.amp import GradScaler

import stablekit
from stablekit_clipping import AGC, AdaGC, AutoClip, ClipValue, GlobalNorm, QuantileClip, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import Diary, X, copies, difference, equal, gradients, picture, small_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Plugin

CHAINS: dict[str, Callable[[], list[Plugin]]] = {
    "norms": lambda: [GlobalNorm(2.0), AdaGC(warmup_steps=3), ZClip(warmup_steps=3), AutoClip()],
    "units": lambda: [AGC(), QuantileClip(history=5, per_tensor=True)],
    "edit first": lambda: [ClipValue(0.1), GlobalNorm(0.5), ZClip(warmup_steps=3)],
    "edit last": lambda: [GlobalNorm(0.5), AdaGC(warmup_steps=3), ClipValue(0.1)],
    "edits": lambda: [ClipValue(0.2), ClipValue(0.1, name="again"), GlobalNorm(0.1)],
}


def _stream(params: list[Tensor], step: int) -> None:
    noise = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=noise) * (10.0 if step % 4 == 3 else 0.1)
    if step in (5, 9):
        assert params[1].grad is not None
        params[1].grad[0] = math.nan if step == 5 else math.inf


@pytest.mark.parametrize("device_mode", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_dry_run_records_what_a_live_run_does_and_changes_no_bit(
    chain: str, fused: bool, device_mode: bool
) -> None:
    nets = [small_model(), small_model(), small_model()]
    live, dry, plain = (optim.SGD(net.parameters(), lr=0.0, fused=fused) for net in nets)
    options: dict[str, Any] = {"device_mode": device_mode, "log_every": 1}
    diaries = Diary(), Diary()
    sessions = [
        stablekit.attach(live, NonFiniteGuard(), *CHAINS[chain](), diaries[0], **options),
        stablekit.attach(
            dry, NonFiniteGuard(), *CHAINS[chain](), diaries[1], dry_run=True, **options
        ),
    ]
    for step in range(12):
        for net, optimizer in zip(nets, (live, dry, plain), strict=True):
            _stream(list(net.parameters()), step)
            if optimizer is dry:
                raw = gradients(net)
                optimizer.step()
                assert equal(raw, gradients(net))
            else:
                optimizer.step()
            net.load_state_dict(small_model().state_dict())  # the NaN that a dry run lets through
    shown = [diary.metrics for diary in diaries]
    assert list(shown[0]) == list(shown[1])
    for number in shown[0]:
        assert shown[1][number] == pytest.approx(shown[0][number], rel=1e-6, nan_ok=True)
    mine, other = (session.state_dict() for session in sessions)
    assert difference(mine, other) == ""
    assert sessions[0].skipped == 2


@pytest.mark.parametrize("device_mode", [False, True])
@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_as_without_stablekit(
    make: Callable[..., optim.Optimizer], fused: bool, device_mode: bool
) -> None:
    model, twin = small_model(), small_model()
    dry = make(model.parameters(), lr=0.1, fused=fused)
    plain = make(twin.parameters(), lr=0.1, fused=fused)
    plugins = [NonFiniteGuard(), GlobalNorm(0.01), ClipValue(0.001), AGC()]
    stablekit.attach(dry, *plugins, dry_run=True, device_mode=device_mode)
    for step in range(8):
        for net, optimizer in ((model, dry), (twin, plain)):
            _stream(list(net.parameters()), step)
            optimizer.step()
    assert difference(picture(plain)["params"], picture(dry)["params"]) == ""
    assert difference(list(plain.state.values()), list(dry.state.values())) == ""


def test_dry_run_under_a_scaler_leaves_its_skips_alone() -> None:
    model, twin = small_model(), small_model()
    dry = optim.AdamW(model.parameters(), fused=True)
    plain = optim.AdamW(twin.parameters(), fused=True)
    session = stablekit.attach(dry, NonFiniteGuard(), GlobalNorm(0.01), dry_run=True)
    scalers = GradScaler("cpu", init_scale=64.0), GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        for net, optimizer, scaler in zip((model, twin), (dry, plain), scalers, strict=True):
            net.zero_grad()
            scaler.scale(net(X).square().mean()).backward()
            if step == 2:
                next(net.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
    assert equal(copies(model.parameters()), copies(twin.parameters()))
    assert scalers[0].get_scale() == scalers[1].get_scale() == 32.0
    assert [event.kind for event in session.events] == ["scaler-skip"]


def test_dry_run_of_a_closure_changes_no_bit() -> None:
    model, twin = small_model(), small_model()
    dry = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    plain = optim.LBFGS(twin.parameters(), lr=0.1, max_iter=3)
    stablekit.attach(dry, NonFiniteGuard(), GlobalNorm(0.01), ClipValue(0.001), dry_run=True)

    def closure(net: torch.nn.Module) -> Tensor:
        net.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    for _ in range(3):
        dry.step(lambda: closure(model))
        plain.step(lambda: closure(twin))
    assert equal(copies(model.parameters()), copies(twin.parameters()))
