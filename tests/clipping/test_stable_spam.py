"""StableSPAM on AdamW is the authors' optimizer; elsewhere it does the parts that make sense."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import AttachError
from stablekit_clipping import StableSPAM
from stablekit_clipping.stable_spam import adaclip_limit, adagn_norm, cosine_scale
from tests.clipping.streams import golden, initial_values, numbers, stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stablekit import Session

STREAM = golden("stream")
SAMPLES = [step - 1 for step in STREAM["sample_steps"]]
TRACES = golden("stable_spam")["traces"]

IMPLEMENTATIONS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
MODES = {"host": False, "device": True}


def arguments(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a reference's configuration into ours for AdamW and for the plugin."""
    rest = dict(config)
    betas = tuple(rest.pop("betas", (0.9, 0.999)))
    adam = {"lr": rest.pop("lr"), "weight_decay": rest.pop("weight_decay", 0.0), "betas": betas}
    renamed = {"update_proj_gap": "reset_interval", "total_T": "total_steps"}
    return adam, {renamed.get(key, key): value for key, value in rest.items()}


class Trained:
    """AdamW on the public stream, with a plugin."""

    def __init__(self, plugin: object, *, device_mode: bool = False, **adam: Any) -> None:  # noqa: ANN401 - options of AdamW
        values = initial_values(STREAM["seed"])
        self.params = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
        named = [(f"t{i}", param) for i, param in enumerate(self.params)]
        self.optimizer = torch.optim.AdamW(named, **adam)
        self.session: Session = stablekit.attach(self.optimizer, plugin, device_mode=device_mode)
        self.norms: list[float] = []
        self.values: list[list[float]] = []

    def go(self, gradients: Iterable[list[Any]]) -> Trained:
        for step in gradients:
            for param, gradient in zip(self.params, step, strict=True):
                param.grad = torch.from_numpy(gradient.copy())
            self.optimizer.step()
            squares = [float(param.detach().double().square().sum()) for param in self.params]
            self.norms.append(math.sqrt(sum(squares)))
            self.values.append([param.detach().ravel()[0].item() for param in self.params])
        return self


def public_stream() -> list[list[Any]]:
    return list(stream(STREAM["seed"], STREAM["n_steps"], STREAM["spikes"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_parameters_follow_the_authors_optimizer(
    trace: dict[str, Any], implementation: str, mode: str
) -> None:
    adam, ours = arguments(trace["config"])
    run = Trained(
        StableSPAM(**ours), device_mode=MODES[mode], **adam, **IMPLEMENTATIONS[implementation]
    ).go(public_stream())
    if "param_norm" in trace:
        np.testing.assert_allclose(run.norms, trace["param_norm"], rtol=1e-5)
        values = numbers(trace["param_values"]).T
        np.testing.assert_allclose(run.values, values, rtol=1e-5, atol=1e-6)
    else:
        norms, values = trace["param_norm_at_sample_steps"], trace["param_values_at_sample_steps"]
        np.testing.assert_allclose(np.array(run.norms)[SAMPLES], norms, rtol=1e-5)
        np.testing.assert_allclose(np.array(run.values)[SAMPLES], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_statistics_are_the_authors(trace: dict[str, Any]) -> None:
    adam, ours = arguments(trace["config"])
    plugin = StableSPAM(**ours)
    run = Trained(plugin, **adam)
    seen = []
    for number, gradients in enumerate(public_stream(), start=1):
        run.go([gradients])
        if number in trace["state_steps"]:
            rows = plugin.state_dict()["rows"]
            seen.append([[*rows[name][1:], rows[name][0]] for name in ("t0", "t1", "t2")])
    expected = numbers(trace["state_m_max_m_norm_v_norm_step"])
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-9)


def test_bias_corrections_keep_their_digits_where_gamma_is_near_one() -> None:
    average = torch.tensor([1e-3 * 7.0])
    limit = adaclip_limit(average, torch.tensor([1.0]), gamma3=0.999)
    torch.testing.assert_close(limit, torch.tensor([7.0]), rtol=1e-6, atol=0.0)


def test_a_steady_norm_becomes_one() -> None:
    mean, square = torch.zeros(1), torch.zeros(1)
    for count in range(1, 60):
        mean, square = 0.7 * mean + 0.3 * 5.0, 0.9 * square + 0.1 * 25.0
        wanted = adagn_norm(
            mean, square, torch.tensor([float(count)]), gamma1=0.7, gamma2=0.9, eps=0.0
        )
        torch.testing.assert_close(wanted, torch.ones(1))


def test_cosine_is_the_published_one() -> None:
    published = golden("edge_cases")["stablespam"]["cosine_scale_total_T_100_eta_0.5"]
    ours = {t: cosine_scale(int(t), total_steps=100, eta_min=0.5) for t in published}
    assert ours == pytest.approx(published, abs=6e-5)


def test_update_at_a_reset_is_the_published_one() -> None:
    published = golden("edge_cases")["stablespam"][
        "update_over_lr_constant_grad_gap50_steps_48_to_56"
    ]
    param = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.0)
    stablekit.attach(optimizer, StableSPAM(reset_interval=50))
    updates = []
    for _ in range(56):
        before = param.detach().clone()
        param.grad = torch.full((4,), 0.1)
        optimizer.step()
        updates.append((before - param.detach())[0].item() / 1e-3)
    assert updates[47:] == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_one_bad_element_does_not_stay(bad: float, mode: str) -> None:
    plugin = StableSPAM()
    param = nn.Parameter(torch.zeros(4))
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([param, other], lr=0.0, momentum=0.5)
    stablekit.attach(optimizer, plugin, device_mode=MODES[mode])
    states = []
    for value in (1.0, bad, 1.0):
        param.grad, other.grad = torch.ones(4), torch.ones(3)
        param.grad[0] = value
        optimizer.step()
        states.append(plugin.state_dict()["rows"])
    name, other_name = states[0]
    assert states[1][name] == states[0][name]
    assert states[1][other_name][0] == 2.0
    assert all(math.isfinite(value) for row in states[2].values() for value in row)
    assert param.grad is not None
    torch.testing.assert_close(param.grad.norm(), torch.tensor(1.0))


def test_beta1_is_lent_for_one_update_only() -> None:
    seen = []

    class Betas:
        name = "betas"

        @stablekit.hookimpl
        def before_update(self, step: stablekit.Step) -> None:
            seen.append(step.groups[0]["betas"])

    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([param], betas=(0.8, 0.9))
    stablekit.attach(optimizer, StableSPAM(total_steps=4, eta_min=0.5), Betas())
    for _ in range(4):
        param.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    cosine = [0.5 + 0.25 * (1 + math.cos(math.pi * t / 5)) for t in range(1, 5)]
    assert [beta1 for beta1, _ in seen] == pytest.approx([0.8 * s for s in cosine])
    assert {beta2 for _, beta2 in seen} == {0.9}


def test_beta1_comes_back_after_an_optimizer_that_raised() -> None:
    class Failing(torch.optim.AdamW):
        def step(self, closure: object = None) -> None:  # type: ignore[override]  # raises anyway
            raise RuntimeError("out of memory")

    param = nn.Parameter(torch.zeros(2))
    optimizer = Failing([param])
    session = stablekit.attach(optimizer, StableSPAM(total_steps=4))
    param.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    session.detach()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_momentum_of_sgd_is_reset_after_the_update() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    session = stablekit.attach(optimizer, StableSPAM(reset_interval=3))
    buffers = []
    for _ in range(4):
        param.grad = torch.ones(2)
        optimizer.step()
        buffers.append(optimizer.state[param]["momentum_buffer"].clone())
    assert buffers[1].abs().min() > 0
    assert buffers[2].tolist() == [0.0, 0.0]
    assert buffers[3].abs().min() > 0
    assert [(event.kind, event.step) for event in session.events] == [("reset", 3)]


def test_an_optimizer_without_moments_is_refused_unless_nothing_is_to_be_reset() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    refused = stablekit.wrap(torch.optim.SGD([param], lr=0.1), StableSPAM())
    with pytest.raises(AttachError, match="SGD keeps none"):
        refused.step()
    param.grad = torch.ones(2)
    stablekit.wrap(torch.optim.SGD([param], lr=0.1), StableSPAM(reset_interval=0)).step()
    torch.testing.assert_close(param.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("given", [{"total_steps": 10}, {"gamma1": -1}])
def test_an_optimizer_without_beta1_is_refused_where_it_is_needed(given: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    with pytest.raises(AttachError, match="SGD has no betas"):
        stablekit.attach(optimizer, StableSPAM(**given))


def test_a_part_of_a_group_cannot_have_a_beta1_of_its_own() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    plugin = stablekit.only(StableSPAM(total_steps=5), include=["weight"])
    stablekit.attach(optimizer, plugin, model=layer)
    layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(AttachError, match="whole parameter group"):
        optimizer.step()


def test_gamma1_may_be_the_optimizers_beta1() -> None:
    runs = [
        Trained(plugin, lr=0.01, betas=(0.6, 0.99)).go(public_stream()[:30])
        for plugin in (StableSPAM(-1), StableSPAM(0.6))
    ]
    assert runs[0].values == runs[1].values


@pytest.mark.parametrize("at", range(1, 24))
def test_resume_at_any_step_is_bit_identical(at: int) -> None:
    def new() -> Trained:
        return Trained(StableSPAM(total_steps=30, reset_interval=8), lr=0.01, fused=True)

    gradients = public_stream()[:24]
    whole = new().go(gradients)
    first = new().go(gradients[:at])
    resumed = new()
    for param, saved in zip(resumed.params, first.params, strict=True):
        param.data.copy_(saved.data)
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.go(gradients[at:])
    assert resumed.values == whole.values[at:]


def test_a_skipped_reset_comes_at_the_next_update() -> None:
    class SkipThird:
        name = "skip-third"

        @stablekit.hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            step.skip("third", when=torch.tensor(step.number == 3))

    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([param], fused=True)
    session = stablekit.attach(
        optimizer, SkipThird(), StableSPAM(reset_interval=3), device_mode=True, log_every=1
    )
    for _ in range(5):
        param.grad = torch.ones(2)
        optimizer.step()
    assert [event.step for event in session.events if event.kind == "reset"] == [4]
