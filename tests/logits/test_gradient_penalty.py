"""The gradient penalty is that of WGAN-GP, and the plugin adds it as if it were in the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit.testing import check_plugin
from stablekit_logits import (
    GradientPenalty,
    GradientPenaltyLoss,
    gradient_penalty,
    interpolate,
    slope_penalty,
    slopes,
)
from tests.logits.small import close, exact, golden, same

INPUTS, OUTPUTS = golden("wgan_gp")
NAME = "gradient-penalty"


def golden_critic() -> Any:  # noqa: ANN401 - weights and the critic of them
    weight = INPUTS["W1"].clone().requires_grad_()
    return weight, lambda x: torch.tanh(x @ weight.T + INPUTS["b1"]) @ INPUTS["w2"]


def test_slopes_penalty_and_gradients_are_the_golden_ones() -> None:
    weight, critic = golden_critic()
    points = INPUTS["real"] + INPUTS["alpha"] * (INPUTS["fake"] - INPUTS["real"])
    found = slopes(critic, points)
    penalty = slope_penalty(found)
    cost = critic(INPUTS["fake"]).mean() - critic(INPUTS["real"]).mean() + 10 * penalty
    (gradient,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    cost.backward()
    torch.testing.assert_close(found.detach(), exact(OUTPUTS["slopes"]), rtol=0, atol=1e-9)
    assert abs(penalty.item() - OUTPUTS["gp_two_sided"]) < 1e-9
    assert abs(slope_penalty(found, one_sided=True).item() - OUTPUTS["gp_one_sided"]) < 1e-9
    assert abs(cost.item() - OUTPUTS["critic_cost_lambda10"]) < 1e-9
    torch.testing.assert_close(gradient, exact(OUTPUTS["grad_gp"][0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(weight.grad, exact(OUTPUTS["grad_total_W1"]), rtol=0, atol=1e-9)


@given(
    direction=st.lists(st.floats(-3, 3), min_size=2, max_size=5).filter(
        lambda v: sum(x * x for x in v) > 0.1
    ),
    length=st.floats(0, 5),
)
def test_a_linear_critic_costs_the_square_of_its_excess_slope(
    direction: list[float], length: float
) -> None:
    unit = torch.tensor(direction, dtype=torch.float64)
    unit = unit / unit.norm() * length
    real, fake = torch.zeros(3, len(direction)).double(), torch.ones(3, len(direction)).double()
    found = gradient_penalty(lambda x: x @ unit, real, fake).item()
    assert found == pytest.approx((length - 1) ** 2, abs=1e-5)
    one_sided = gradient_penalty(lambda x: x @ unit, real, fake, one_sided=True).item()
    assert one_sided == pytest.approx(max(0.0, length - 1) ** 2, abs=1e-5)


def test_points_lie_between_each_real_sample_and_its_fake() -> None:
    real, fake = torch.zeros(64, 2, 3), torch.ones(64, 2, 3)
    points = interpolate(real, fake, generator=torch.Generator().manual_seed(1))
    assert torch.equal(points, points[:, :1, :1].expand_as(points))
    shares = points[:, 0, 0]
    assert 0 <= float(shares.min()) < 0.1 < 0.9 < float(shares.max()) <= 1
    again = interpolate(real, fake, generator=torch.Generator().manual_seed(1))
    assert torch.equal(points, again)


def test_a_slope_of_zero_has_a_finite_gradient() -> None:
    weight = torch.zeros(3, requires_grad=True)
    gradient_penalty(lambda x: x @ weight, torch.zeros(2, 3), torch.ones(2, 3)).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_its_gradient_is_that_of_finite_differences() -> None:
    weight, critic = golden_critic()

    def penalty() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return gradient_penalty(critic, INPUTS["real"], INPUTS["fake"], generator=generator)

    (gradient,) = torch.autograd.grad(penalty(), weight)
    with torch.no_grad():
        for place in ((0, 0), (3, 2), (7, 4)):
            weight[place] += 1e-6
            above = penalty().item()
            weight[place] -= 2e-6
            below = penalty().item()
            weight[place] += 1e-6
            assert (above - below) / 2e-6 == pytest.approx(float(gradient[place]), abs=1e-7)


def test_bf16_slopes_are_float32() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16)
    points = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert slopes(lambda x: x @ weight, points).dtype == torch.float32


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[4, 2\]"):
        gradient_penalty(lambda x: x.sum(1), torch.zeros(3, 2), torch.zeros(4, 2))


def test_the_loss_is_the_critics_and_gives_the_generator_nothing() -> None:
    weight, critic = golden_critic()
    fake = INPUTS["fake"].clone().requires_grad_()
    loss = GradientPenaltyLoss(0.0)(critic, INPUTS["real"], fake)
    assert loss.item() == pytest.approx(OUTPUTS["critic_cost_no_gp"], abs=1e-9)
    torch.manual_seed(0)
    loss = GradientPenaltyLoss(10.0)(critic, INPUTS["real"], fake)
    loss.backward()
    torch.manual_seed(0)
    points = interpolate(INPUTS["real"], INPUTS["fake"])
    expected = OUTPUTS["critic_cost_no_gp"] + 10 * slope_penalty(slopes(critic, points)).item()
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert fake.grad is None
    assert weight.grad is not None


# ---- the plugin


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.net(x)
        return score


def pair(number: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(number)
    return torch.randn(rows, 3, generator=made), torch.randn(rows, 3, generator=made) + 1


def seen_points(number: int, count: int, real: Tensor, fake: Tensor) -> Tensor:
    """Return the points the plugin draws: of a step and the pair in it."""
    mixed = number * 1_000_003 + count
    return interpolate(real, fake, generator=torch.Generator().manual_seed(mixed))


def train(
    *plugins: Any,  # noqa: ANN401 - any plugin form
    steps: int = 3,
    parts: int = 1,
    scale: float = 1.0,
    by_hand: float = 0.0,
    batches: str = "calls",
    swapped: bool = False,
    **options: Any,  # noqa: ANN401 - of attach
) -> tuple[list[Tensor], Any]:
    """Train a critic, with plugins or with the penalty written into the loss."""
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    session = stablekit.attach(optimizer, *plugins, model=critic, **options) if plugins else None
    for number in range(steps):
        optimizer.zero_grad()
        reals, fakes = pair(number)
        chunks = zip(reals.chunk(parts), fakes.chunk(parts), strict=True)
        for count, (real, fake) in enumerate(chunks, start=1):
            if batches == "halves":
                a, b = critic(torch.cat([real, fake])).chunk(2)
            elif swapped:
                b, a = critic(fake), critic(real)
            else:
                a, b = critic(real), critic(fake)
            loss = b.mean() - a.mean()
            if by_hand:
                points = seen_points(number, count, *((fake, real) if swapped else (real, fake)))
                loss = loss + by_hand * slope_penalty(slopes(critic, points))
            (loss * scale / parts).backward()
        for param in critic.parameters():
            assert param.grad is not None
            param.grad /= scale
        optimizer.step()
    return [param.detach() for param in critic.parameters()], session


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("batches", ["calls", "halves"])
def test_the_plugin_trains_as_a_loss_with_the_penalty(
    parts: int, scale: float, batches: str
) -> None:
    plugin = GradientPenalty(2.0, batches=batches)
    weights, session = train(plugin, parts=parts, scale=scale, batches=batches)
    expected, _ = train(by_hand=2.0, parts=parts)
    assert close(weights, expected, rtol=1e-4)
    assert not close(weights, train(parts=parts)[0], rtol=1e-2)
    metrics = session.metrics()
    assert 0 < metrics[f"{NAME}/penalty"] < 1
    assert 0 < metrics[f"{NAME}/slope"] < 1


def test_the_order_of_a_pair_does_not_turn_the_penalty_round() -> None:
    weights, session = train(GradientPenalty(2.0), swapped=True)
    assert close(weights, train(by_hand=2.0, swapped=True)[0], rtol=1e-4)
    assert session.metrics()[f"{NAME}/penalty"] > 0


@pytest.mark.parametrize("options", [{}, {"device_mode": True}])
def test_weight_zero_and_a_dry_run_train_bitwise_alike(options: dict[str, Any]) -> None:
    bare, _ = train()
    assert same(train(GradientPenalty(0.0), **options)[0], bare)
    assert same(train(GradientPenalty(9.0), dry_run=True, **options)[0], bare)


def test_it_uses_up_none_of_the_random_numbers_of_the_training() -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(), model=critic)
    before = torch.get_rng_state()
    real, fake = pair(0)
    (critic(fake).mean() - critic(real).mean()).backward()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generators_turn_is_left_alone() -> None:
    critic, generator = Critic(), nn.Linear(2, 3)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
    session = stablekit.attach(optimizer, GradientPenalty(5.0), model=critic)
    plain = copy.deepcopy(critic)
    for _ in range(2):
        noise, (real, _) = torch.randn(8, 2), pair(0)
        fake = generator(noise)
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        optimizer.step()
        turns = []
        for one in (critic, plain):
            generator.zero_grad()
            (-one(generator(noise)).mean()).backward()
            turns.append([p.grad.clone() for p in generator.parameters() if p.grad is not None])
        assert same(*turns)
    assert session.number == 2


def test_another_loss_needs_its_factor() -> None:
    def hinge(critic: Critic, number: int) -> Tensor:
        real, fake = pair(number)
        of_real: Tensor = (1 - critic(real)).relu().mean()
        of_fake: Tensor = (1 + 2 * critic(fake)).relu().square().mean()
        return of_real + of_fake

    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(), model=critic)
    hinge(critic, 0).backward()
    with pytest.raises(AttachError, match=r"loss_factor=.*1 without gradient accumulation"):
        optimizer.step()

    critic, by_hand = Critic(), Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(3.0, loss_factor=0.5), model=critic)
    (0.5 * hinge(critic, 0)).backward()
    points = seen_points(0, 1, *pair(0))
    (0.5 * (hinge(by_hand, 0) + 3 * slope_penalty(slopes(by_hand, points)))).backward()
    for ours, theirs in zip(critic.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_in_device_mode_another_loss_is_an_event() -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    session = stablekit.attach(optimizer, GradientPenalty(), model=critic, device_mode=True)
    real, fake = pair(0)
    (critic(fake).square().mean() - critic(real).square().mean()).backward()
    optimizer.step()
    session.metrics()
    assert [event.kind for event in session.events] == ["other-loss"]


def test_another_loss_in_one_half_of_the_samples_is_noticed() -> None:
    for batches in ("calls", "halves"):
        critic = Critic()
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
        stablekit.attach(optimizer, GradientPenalty(batches=batches), model=critic)
        both = torch.cat(pair(0))
        real, fake = critic(both).chunk(2) if batches == "halves" else map(critic, both.chunk(2))
        (fake.square().mean() - real.mean()).backward()
        with pytest.raises(AttachError, match="loss_factor"):
            optimizer.step()


def test_halves_that_weigh_differently_are_another_loss() -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(batches="halves"), model=critic)
    real, fake = critic(torch.cat(pair(0))).chunk(2)
    (2 * fake.mean() - real.mean()).backward()
    with pytest.raises(AttachError, match="loss_factor"):
        optimizer.step()


def test_a_loss_that_does_not_feel_the_critic_is_another_loss() -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(), model=critic)
    real, fake = map(critic, pair(0))
    (torch.relu(fake - 1e6).mean() - real.mean()).backward()
    with pytest.raises(AttachError, match="loss_factor"):
        optimizer.step()


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_calls_that_are_no_pairs_are_an_error(calls: int) -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    stablekit.attach(optimizer, GradientPenalty(), model=critic)
    sum((critic(pair(n)[0]).mean() for n in range(calls)), start=torch.zeros(())).square()
    words = "odd number of calls.*batches='halves'" if calls else "did not call it"
    with pytest.raises(AttachError, match=words):
        optimizer.step()


def test_batches_and_critics_it_cannot_take_are_refused() -> None:
    critic = Critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    with stablekit.attach(optimizer, GradientPenalty(), model=critic):
        critic(torch.zeros(4, 3))
        with pytest.raises(ValueError, match="as many real as fake"):
            critic(torch.zeros(5, 3))
    with (
        stablekit.attach(optimizer, GradientPenalty(batches="halves"), model=critic),
        pytest.raises(ValueError, match="two halves, got 5"),
    ):
        critic(torch.zeros(5, 3))
    for norm in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3)):
        mixing = nn.Sequential(nn.Linear(3, 3), norm)
        its = torch.optim.SGD(mixing.parameters())
        with pytest.raises(AttachError, match=r"BatchNorm.*use nn\.LayerNorm"):
            stablekit.attach(its, GradientPenalty(), model=mixing)
    critic.compile(backend="eager")
    with pytest.raises(AttachError, match="not compiled"):
        stablekit.attach(optimizer, GradientPenalty(), model=critic)


def test_detach_and_copies_leave_no_trace() -> None:
    critic = Critic()
    keys = set(vars(critic))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    session = stablekit.attach(optimizer, GradientPenalty(on="net"), model=critic)
    copied = copy.deepcopy(critic)
    assert copied(pair(0)[0]).grad_fn.name() == "AddmmBackward0"
    session.detach()
    assert set(vars(critic)) == keys
    assert not any(module._forward_hooks for module in critic.modules())


def test_a_resumed_run_is_the_same() -> None:
    def run(saved: dict[str, Any] | None, first: int, last: int) -> tuple[Any, dict[str, Any]]:
        critic = Critic()
        optimizer = torch.optim.Adam(critic.parameters())
        stablekit.attach(optimizer, GradientPenalty(), model=critic)
        if saved is not None:
            critic.load_state_dict(saved["critic"])
            optimizer.load_state_dict(saved["optimizer"])
        for number in range(first, last):
            real, fake = pair(number)
            optimizer.zero_grad()
            (critic(fake).mean() - critic(real).mean()).backward()
            optimizer.step()
        state = {"critic": critic.state_dict(), "optimizer": optimizer.state_dict()}
        return [param.detach() for param in critic.parameters()], copy.deepcopy(state)

    straight, _ = run(None, 0, 6)
    _, saved = run(None, 0, 3)
    assert same(run(saved, 3, 6)[0], straight)


def test_it_keeps_the_contract_of_plugins() -> None:
    check_plugin(GradientPenalty.example)
