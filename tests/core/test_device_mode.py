"""Device mode decides without reading the host, and decides the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import stablekit
from stablekit.errors import NonFiniteError
from stablekit_clipping import AGC, AdaGC, AutoClip, ClipValue, GlobalNorm, QuantileClip, ZClip
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import Diary, copies, set_gradients, small_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Plugin, Session

CLIPPERS: dict[str, Callable[[], list[Plugin]]] = {
    "global-norm": lambda: [GlobalNorm(0.5)],
    "infinity norm": lambda: [GlobalNorm(0.5, norm_type=math.inf)],
    "clip-value": lambda: [ClipValue(0.1)],
    "zclip": lambda: [ZClip(warmup_steps=3, max_grad_norm=None)],
    "adagc": lambda: [AdaGC(warmup_steps=3)],
    "autoclip": lambda: [AutoClip(50.0)],
    "quantile": lambda: [QuantileClip(history=5)],
    "quantile per tensor": lambda: [QuantileClip(history=5, per_tensor=True)],
    "agc": lambda: [AGC()],
    "all": lambda: [AGC(), ClipValue(0.2), AdaGC(warmup_steps=2), AutoClip(), GlobalNorm(0.1)],
}


class HostReads(TorchDispatchMode):
    """Counts every operation that brings a value of a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _stream(params: list[Tensor], step: int, bad: tuple[int, ...] = ()) -> None:
    noise = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=noise) * (8.0 if step % 5 == 4 else 0.1)
        param.grad = grad.to(param.device)
    if step in bad:
        assert params[0].grad is not None
        params[0].grad.view(-1)[0] = math.nan if step % 2 else math.inf


@pytest.mark.parametrize("chain", CLIPPERS)
@pytest.mark.parametrize("foreach", [False, True])
def test_clippers_run_where_no_tensor_has_a_value(chain: str, foreach: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
    session = stablekit.attach(optimizer, *CLIPPERS[chain]())
    assert not session.host
    for _ in range(12):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert (session.number, session.updates, session.events) == (12, 12, [])


@pytest.mark.parametrize("chain", CLIPPERS)
@pytest.mark.parametrize("fused", [False, True])
def test_clippers_read_no_value_between_log_points(chain: str, fused: bool) -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=fused)
    stablekit.attach(optimizer, *CLIPPERS[chain](), device_mode=True, log_every=100)
    for step in range(10):
        _stream(list(model.parameters()), step)
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0


@pytest.mark.parametrize("fused", [False, True])
def test_skip_costs_one_read_a_step_and_none_where_the_kernel_can_skip(fused: bool) -> None:
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    plugins = [NonFiniteGuard(), ZClip(warmup_steps=3), AdaGC(warmup_steps=3)]
    stablekit.attach(optimizer, *plugins, device_mode=True, log_every=100)
    for step in range(10):
        _stream(list(model.parameters()), step, bad=(3, 6))
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == (0 if fused else 1)


@pytest.mark.parametrize("chain", CLIPPERS)
@pytest.mark.parametrize("fused", [False, True])
def test_host_and_device_decide_the_same(chain: str, fused: bool) -> None:
    runs: list[tuple[Session, Diary, nn.Module]] = []
    for device_mode in (False, True):
        model, diary = small_model(), Diary()
        optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        options: dict[str, Any] = {"device_mode": device_mode, "log_every": 1}
        plugins = [NonFiniteGuard(), *CLIPPERS[chain](), diary]
        runs.append((stablekit.attach(optimizer, *plugins, **options), diary, model))
        for step in range(20):
            _stream(list(model.parameters()), step, bad=(0, 5, 6, 12))
            optimizer.step()
    (host, said, one), (device, also, two) = runs
    torch.testing.assert_close(copies(one.parameters()), copies(two.parameters()))
    for number, metrics in said.metrics.items():
        mine = {key: value for key, value in metrics.items() if number not in (1, 6, 7, 13)}
        other = {key: also.metrics[number][key] for key in mine}
        assert other == pytest.approx(mine, rel=1e-6, abs=1e-7, nan_ok=True)
    assert [e.as_dict() for e in host.events] == [e.as_dict() for e in device.events]
    assert (host.number, host.updates, host.skipped) == (20, 16, 4)
    assert (device.number, device.updates, device.skipped) == (20, 16, 4)


@pytest.mark.parametrize("fused", [False, True])
def test_news_arrive_at_most_log_every_steps_late_and_complete(fused: bool) -> None:
    model, diary = small_model(), Diary()
    optimizer = optim.AdamW(model.parameters(), fused=fused)
    session = stablekit.attach(
        optimizer, NonFiniteGuard(), GlobalNorm(), diary, device_mode=True, log_every=4
    )
    for step in range(1, 9):
        _stream(list(model.parameters()), step, bad=(2, 3, 8))
        optimizer.step()
        if step == 3:
            assert session.events == []
    assert [(e.kind, e.step) for e in session.events] == [
        (kind, step) for step in (2, 3, 8) for kind in ("nonfinite", "skip")
    ]
    assert diary.pages.count("on_skip") == session.skipped == 3
    assert session.updates == 5
    assert list(diary.metrics) == [4, 8]
    assert diary.metrics[8]["steps_skipped"] == 3.0


def test_guard_gives_up_at_the_next_read_and_no_event_is_lost() -> None:
    model, twin = small_model(), small_model()
    optimizer = optim.AdamW(model.parameters(), fused=True)
    guard = NonFiniteGuard(max_consecutive=3)
    session = stablekit.attach(optimizer, guard, device_mode=True, log_every=10)
    for _ in range(9):
        set_gradients(model.parameters(), math.nan)
        optimizer.step()
    set_gradients(model.parameters(), math.nan)
    with pytest.raises(NonFiniteError, match="4 steps in a row, up to step 4"):
        optimizer.step()
    assert session.skipped == 10
    assert session.updates == 0
    assert len([event for event in session.events if event.kind == "skip"]) == 10
    torch.testing.assert_close(copies(model.parameters()), copies(twin.parameters()))


def test_metrics_asked_for_in_between_are_complete() -> None:
    model = small_model()
    optimizer = optim.AdamW(model.parameters(), fused=True)
    session = stablekit.attach(optimizer, NonFiniteGuard(), device_mode=True, log_every=100)
    for step in range(3):
        _stream(list(model.parameters()), step, bad=(1,))
        optimizer.step()
    metrics = session.metrics()
    assert metrics["steps_skipped"] == metrics["nonfinite-guard/skipped"] == 1.0
    assert (session.updates, len(session.events)) == (2, 2)
    assert session.state_dict()["updates"] == 2


def test_mode_follows_the_parameters_unless_forced() -> None:
    assert stablekit.attach(optim.SGD([torch.zeros(1)])).host
    assert not stablekit.attach(optim.SGD([torch.zeros(1)]), device_mode=True).host
    assert not stablekit.attach(optim.SGD([torch.zeros(1, device="meta")])).host
