"""UpdateClip, Cautious and MomentumReset turn stock optimizers into the published ones."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit_updates import Cautious, MomentumReset, UpdateClip
from stablekit_updates.update_clip import moment_ratio_square
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MODES = {"host": False, "device": True}
ADAMW = {
    "loop": lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw),
    "foreach": lambda params, **kw: torch.optim.AdamW(params, foreach=True, **kw),
    "fused": lambda params, **kw: torch.optim.AdamW(params, fused=True, **kw),
}

each_mode = pytest.mark.parametrize("mode", MODES)
each_adamw = pytest.mark.parametrize("make", ADAMW.values(), ids=ADAMW.keys())


def train(
    optimizer: torch.optim.Optimizer, param: nn.Parameter, gradients: Iterable[Tensor]
) -> list[Tensor]:
    seen = []
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        seen.append(param.detach().clone())
    return seen


@each_mode
@each_adamw
def test_adamw_with_update_clip_is_optimis_stable_adamw(
    make: Callable[..., torch.optim.AdamW], mode: str
) -> None:
    inputs, outputs = golden("stableadamw")
    gradients = inputs["grads"].clone()
    gradients[3] *= 50
    param = nn.Parameter(inputs["p"].clone())
    optimizer = make([param], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    session = stablekit.attach(optimizer, UpdateClip(), device_mode=MODES[mode])
    for gradient, step in zip(gradients, outputs["steps"], strict=True):
        (after,) = train(optimizer, param, [gradient])
        expected = torch.tensor(step["param"], dtype=torch.float64)
        torch.testing.assert_close(after, expected, rtol=1e-7, atol=1e-8)
        metrics = session.metrics()
        assert metrics["update-clip/rms"] == pytest.approx(step["rms"], rel=1e-6)
        assert metrics["update-clip/factor"] == pytest.approx(step["lr_eff"] / 0.1, rel=1e-6)


@each_adamw
def test_updates_that_are_not_too_large_are_bitwise_adamws(
    make: Callable[..., torch.optim.AdamW],
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 3, generator=generator) for _ in range(6)]
    start = torch.randn(5, 3, generator=generator)
    bare, clipped = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    with_plugin = stablekit.wrap(make([clipped], lr=0.1), UpdateClip(threshold=1e6))
    for ours, theirs in zip(
        train(with_plugin, clipped, gradients),
        train(make([bare], lr=0.1), bare, gradients),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_rms_does_not_depend_on_the_scale_of_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(5)]
    seen = []
    for scale in (1.0, 1e4):
        param = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        optimizer = torch.optim.AdamW([param], eps=1e-30)
        session = stablekit.attach(optimizer, UpdateClip())
        train(optimizer, param, [gradient * scale for gradient in gradients])
        seen.append(session.metrics()["update-clip/rms"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


def test_only_tensors_that_are_too_large_are_copied() -> None:
    small, large = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    plugin = UpdateClip()
    optimizer = torch.optim.AdamW([small, large])
    copied = []

    class Look:
        name = "look"

        @stablekit.hookimpl
        def before_update(self, step: stablekit.Step) -> None:
            copied.append(sorted(plugin._before))

    stablekit.attach(optimizer, plugin, Look())
    for size in (1.0, 1.0, 30.0):
        small.grad, large.grad = torch.ones(4), torch.full((4,), size)
        optimizer.step()
    assert copied == [[], [], [1]]


def test_long_tensors_are_summed_in_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(200_003, generator=generator)
    moment = torch.rand(200_003, generator=generator)
    after = (0.99 * moment.double() + 0.01 * gradient.double() ** 2) / (1 - 0.99**5)
    expected = (gradient.double() ** 2 / after).sum()
    ours = moment_ratio_square(gradient, moment, beta2=0.99, update=5, eps=1e-8)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), "needs an optimizer with betas"),
        (lambda params: torch.optim.RMSprop(params), "needs an optimizer with betas"),
        (lambda params: torch.optim.Adamax(params), "needs a second moment"),
    ],
    ids=["sgd", "rmsprop", "adamax"],
)
def test_update_clip_refuses_what_is_no_adam(make: Callable[..., Any], reason: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = stablekit.wrap(make([param]), UpdateClip())
    with pytest.raises(AttachError, match=reason):
        train(optimizer, param, [torch.ones(2)] * 2)


@each_mode
@each_adamw
def test_adamw_with_cautious_is_c_adamw(make: Callable[..., torch.optim.AdamW], mode: str) -> None:
    inputs, outputs = golden("cautious")
    param = nn.Parameter(inputs["p"].clone())
    optimizer = make([param], lr=0.1, weight_decay=0.01)
    session = stablekit.attach(optimizer, Cautious(), device_mode=MODES[mode])
    for gradient, step in zip(inputs["grads"], outputs["steps"], strict=True):
        (after,) = train(optimizer, param, [gradient])
        expected = torch.tensor(step["param"], dtype=torch.float64)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)
        assert session.metrics()["cautious/kept"] == pytest.approx(step["kept_frac"], rel=1e-6)


def test_decay_that_is_part_of_the_gradient_is_not_taken_out() -> None:
    """For L2 decay, and for optimizers nobody knows unless told, the whole update is masked."""
    start = torch.tensor([4.0, 4.0])
    expected = []
    for make in (torch.optim.Adam, torch.optim.SGD):
        param = nn.Parameter(start.clone())
        optimizer = make([param], lr=0.1, weight_decay=0.5)
        before = param.detach().clone()
        stablekit.attach(optimizer, Cautious())
        (after,) = train(optimizer, param, [torch.tensor([1.0, -0.1])])
        expected.append(((after - before)[1] == 0.0).item())
    assert expected == [True, True]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_what_is_maximised_goes_uphill(make: Callable[..., torch.optim.Optimizer]) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = make([param], lr=0.1, maximize=True)
    session = stablekit.attach(optimizer, Cautious())
    train(optimizer, param, [torch.ones(4)] * 5)
    assert float(param.detach().min()) > 1.3
    assert session.metrics()["cautious/kept"] == 1.0


def test_cautious_refuses_sparse_gradients_before_anything_moved() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    stablekit.attach(optimizer, Cautious())
    param.grad = torch.ones(3, 2).to_sparse(1)
    with pytest.raises(AttachError, match="one is sparse"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3, 2))


@each_mode
def test_a_skipped_step_moves_nothing(mode: str) -> None:
    class Never:
        name = "never"

        @stablekit.hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            step.skip("never", when=torch.tensor(True))

    for plugin in (UpdateClip(), Cautious(), MomentumReset(1)):
        param = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([param], fused=True)
        stablekit.attach(optimizer, Never(), plugin, device_mode=MODES[mode])
        (after,) = train(optimizer, param, [torch.ones(3)])
        assert torch.equal(after, torch.ones(3))


@each_adamw
def test_the_update_after_a_momentum_reset_is_a_first_update(
    make: Callable[..., torch.optim.AdamW],
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, generator=generator) for _ in range(6)]
    param = nn.Parameter(torch.zeros(4))
    optimizer = stablekit.wrap(make([param], lr=0.1), MomentumReset(3))
    seen = train(optimizer, param, gradients)
    fresh = nn.Parameter(seen[2].clone())
    again = train(make([fresh], lr=0.1), fresh, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(seen[3:], again, strict=True))


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.Adam(p), ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.RMSprop(p), ["square_avg"]),
        (lambda p: torch.optim.Muon(p), ["momentum_buffer"]),
    ],
    ids=["sgd", "adam", "rmsprop", "muon"],
)
def test_the_event_says_which_moments_were_reset(
    make: Callable[..., Any], moments: list[str]
) -> None:
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = make([param])
    session = stablekit.attach(optimizer, MomentumReset(2))
    train(optimizer, param, [torch.ones(2, 2)] * 2)
    (event,) = session.events
    assert (event.kind, event.step, event.data["moments"]) == ("reset", 2, moments)
    assert all(float(optimizer.state[param][key].abs().max()) == 0.0 for key in moments)


def test_resets_go_on_in_a_resumed_run_at_the_same_updates() -> None:
    gradients = [torch.tensor([math.sin(t), 1.0]) for t in range(1, 12)]

    def new() -> tuple[torch.optim.AdamW, nn.Parameter]:
        param = nn.Parameter(torch.zeros(2))
        return stablekit.wrap(torch.optim.AdamW([param]), MomentumReset(4)), param

    whole = train(*new(), gradients)
    for at in range(1, len(gradients)):
        first, second = new(), new()
        train(*first, gradients[:at])
        second[1].data.copy_(first[1].data)
        second[0].load_state_dict(first[0].state_dict())
        rest = train(*second, gradients[at:])
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[at:], strict=True)), at


def test_all_of_them_go_together() -> None:
    names = ["nonfinite-guard", "stable-spam", "update-clip", "cautious", "weight-clip:limit=0.5"]
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    session = stablekit.attach(optimizer, *names, model=model)
    generator = torch.Generator().manual_seed(0)
    for number in itertools.count():
        optimizer.zero_grad()
        loss = model(torch.randn(16, 4, generator=generator)).square().mean()
        (loss * (math.nan if number == 5 else 1.0)).backward()
        optimizer.step()
        if number == 12:
            break
    assert session.skipped == 1
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert all(float(p.detach().abs().max()) <= 0.5 for p in model.parameters() if p.ndim > 1)
