"""ClippingBias tells how often clipping acts and where it turns the mean gradient."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit_monitors import ClippingBias, _sketch
from tests.monitors.watched import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

WINDOW = 8
SHAPES = [(80, 30), (30,), (7, 11, 13), (1,)]
CHAINS: dict[str, Callable[[], list[Any]]] = {
    "one factor": lambda: ["global-norm"],
    "a factor for each tensor": lambda: [
        stablekit.only(stablekit.create("global-norm"), include="0"),
    ],
    "a factor for each unit": lambda: [stablekit.create("agc", clipping=0.001)],
    "element by element": lambda: [stablekit.create("clip-value", limit=0.02)],
    "several": lambda: [stablekit.create("clip-value", limit=0.05), "global-norm"],
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-4),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
}


def parameters() -> nn.ParameterDict:
    made = torch.Generator().manual_seed(0)
    return nn.ParameterDict(
        {str(i): nn.Parameter(torch.randn(s, generator=made)) for i, s in enumerate(SHAPES)}
    )


def give_gradients(params: Iterable[nn.Parameter], number: int) -> None:
    """Make gradients of rank one around a mean, now and then a huge one along its own direction."""
    make = torch.Generator().manual_seed(number)
    steady = torch.Generator().manual_seed(999)
    for param in params:
        flat = torch.randn(param.shape, generator=steady)
        noise = torch.randn(param.shape, generator=make)
        if param.ndim == 2:
            ends = (torch.randn(n, generator=make) for n in param.shape)
            noise = torch.outer(*ends)
        scale = 8.0 if number % 5 == 3 else 0.3
        param.grad = (flat * 0.05 + noise * scale * 0.1) * (0.2 if number % 2 else 1.0)


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


class Exact:
    """The same means without a projection: of raw gradients, and of those the optimizer saw."""

    def __init__(self) -> None:
        self.raw: Tensor | float = 0.0
        self.seen: Tensor | float = 0.0
        self.changed = self.weight = 0.0

    def take(self, raw: Tensor, seen: Tensor) -> dict[str, float]:
        beta = 1 - 1 / WINDOW
        self.raw = self.raw * beta + raw * (1 - beta)
        self.seen = self.seen * beta + seen * (1 - beta)
        self.changed = self.changed * beta + (not torch.equal(raw, seen)) * (1 - beta)
        self.weight = self.weight * beta + (1 - beta)
        cosine = float(self.raw @ self.seen / (self.raw.norm() * self.seen.norm()))
        length = float(self.seen.norm() / self.raw.norm())
        return {"cosine": cosine, "length": length, "fraction": self.changed / self.weight}


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("clipping-bias/")}


def assert_estimates(found: dict[str, float], exact: dict[str, float], sigmas: float = 4) -> None:
    """Compare within the error that the docstring states."""
    sine = math.sqrt(max(0.0, 1 - exact["cosine"] ** 2))
    assert found["fraction"] == pytest.approx(exact["fraction"], rel=1e-5)
    assert abs(found["cosine"] - exact["cosine"]) <= sigmas * sine**2 / 64 + 1e-5
    assert abs(found["length"] - exact["length"]) <= exact["length"] * (sigmas * sine / 64 + 1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_estimates_are_those_of_the_exact_means(
    chain: str, optimizer: str, device_mode: bool
) -> None:
    model, exact = parameters(), Exact()
    run = Run(
        *CHAINS[chain](),
        ClippingBias(WINDOW, every=1),
        model=model,
        make=OPTIMIZERS[optimizer],
        device_mode=device_mode,
    )
    fractions = set()
    for number in range(30):
        give_gradients(model.parameters(), number)
        raw = flat(param.grad for param in model.parameters())
        run.optimizer.step()
        expected = exact.take(raw, flat(param.grad for param in model.parameters()))
        assert_estimates(own(run.metrics()), expected)
        fractions.add(expected["fraction"])
    assert len(fractions) > 1 or chain != "one factor"


def test_the_stream_is_one_that_clipping_biases() -> None:
    model, exact = parameters(), Exact()
    worst = 1.0
    for number in range(30):
        give_gradients(model.parameters(), number)
        raw = flat(param.grad for param in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        worst = min(worst, exact.take(raw, flat(p.grad for p in model.parameters()))["cosine"])
    assert worst < 0.8


def test_without_clipping_there_is_no_bias() -> None:
    run = Run(ClippingBias(WINDOW, every=1), model=parameters())
    for number in range(4):
        give_gradients(run.model.parameters(), number)
        run.optimizer.step()
        expected = {"cosine": 1.0, "length": 1.0, "fraction": 0.0}
        assert own(run.metrics()) == pytest.approx(expected, abs=1e-6)


def test_a_dry_run_tells_what_clipping_would_do() -> None:
    dry = Run("global-norm", ClippingBias(WINDOW, every=1), model=parameters(), dry_run=True)
    live = Run(
        "global-norm",
        ClippingBias(WINDOW, every=1),
        model=parameters(),
        make=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    for number in range(8):
        for run in (dry, live):
            give_gradients(run.model.parameters(), number)
            run.optimizer.step()
        assert own(dry.metrics()) == pytest.approx(own(live.metrics()), rel=1e-4)


def test_the_loss_scale_is_no_part_of_the_gradient() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, scaled = (
        Run(
            "global-norm",
            ClippingBias(WINDOW, every=1),
            model=parameters(),
            make=OPTIMIZERS["fused"],
        )
        for _ in range(2)
    )
    for number in range(6):
        give_gradients(plain.model.parameters(), number)
        plain.optimizer.step()
        give_gradients(scaled.model.parameters(), number)
        for param in scaled.model.parameters():
            assert param.grad is not None
            param.grad *= 1024.0
        scaler.scale(torch.ones(()))
        scaler.step(scaled.optimizer)
        scaler.update()
        assert own(scaled.metrics()) == pytest.approx(own(plain.metrics()), rel=1e-4)


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_skipped_steps_and_faults_do_not_count(device_mode: bool) -> None:
    def run(*guard: str) -> Run:
        return Run(
            *guard,
            "global-norm",
            ClippingBias(WINDOW, every=1),
            model=parameters(),
            make=OPTIMIZERS["fused"],
            device_mode=device_mode,
        )

    good, guarded, bare = run(), run("nonfinite-guard"), run()
    for number in range(6):
        for one in (good, guarded, bare):
            give_gradients(one.model.parameters(), number)
            one.optimizer.step()
        for one in (guarded, bare):
            give_gradients(one.model.parameters(), number)
            one.model["0"].grad[0, 0] = (math.nan, math.inf)[number % 2]
            one.optimizer.step()
    state = good.session.state_dict()["plugins"]["clipping-bias"]["state"]  # type: ignore[union-attr]
    for one in (guarded, bare):
        other = one.session.state_dict()["plugins"]["clipping-bias"]["state"]  # type: ignore[union-attr]
        assert torch.equal(other["means"], state["means"])


def test_steps_between_the_sampled_ones_cost_no_projection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded: list[int] = []
    fold = _sketch.fold

    def counted(total: Tensor) -> Tensor:
        folded.append(run.session.number)  # type: ignore[union-attr]
        return fold(total)

    monkeypatch.setattr(_sketch, "fold", counted)
    run = Run("global-norm", ClippingBias(WINDOW, every=3), model=parameters())
    for number in range(7):
        give_gradients(run.model.parameters(), 0 if number < 3 else 1)
        run.optimizer.step()
    assert folded == [3, 3, 6]  # raw and clipped in step 3; nothing is clipped in step 6


def test_the_means_travel_in_the_checkpoint() -> None:
    straight = Run("global-norm", ClippingBias(WINDOW, every=1), model=parameters())
    for number in range(5):
        give_gradients(straight.model.parameters(), number)
        straight.optimizer.step()
    resumed = Run("global-norm", ClippingBias(WINDOW, every=1), model=parameters())
    resumed.optimizer.load_state_dict(straight.optimizer.state_dict())
    for run in (straight, resumed):
        give_gradients(run.model.parameters(), 7)
        run.optimizer.step()
    assert own(resumed.metrics()) == own(straight.metrics())


@pytest.mark.parametrize(
    "means", [torch.zeros(3), torch.full((2 * _sketch.WIDTH + 2,), math.nan), [0.0]]
)
def test_means_that_are_none_are_refused(means: object) -> None:
    with pytest.raises((TypeError, ValueError), match="means must be"):
        ClippingBias().load_state_dict({"means": means})


def sketched(vectors: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(_sketch.BLOCK)
    for name, data in vectors.items():
        _sketch.add_(total, data.flatten(), name=name)
    return _sketch.fold(total)


def streams() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return pairs of sets of tensors that are hard for projections in different ways."""
    make = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    columns = torch.ones(2000, 768)
    columns[:, :3] = 30.0
    outer = torch.outer(torch.ones(2000), noise(768))
    sparse = torch.zeros(3000, 256)
    sparse[:20] = noise(20, 256)
    alike = {f"norm{i}": torch.linspace(0, 1, 512) + 0.1 * noise(512) for i in range(40)}
    return {
        "noise": ({"w": noise(1500, 400)}, {"w": noise(1500, 400)}),
        "few columns": ({"w": columns}, {"w": columns + noise(2000, 768)}),
        "rank one": ({"w": outer}, {"w": outer + 0.3 * noise(2000, 768)}),
        "few rows": ({"w": sparse}, {"w": 0.5 * sparse + 0.01}),
        "many alike": (alike, {name: v + 0.5 * noise(512) for name, v in alike.items()}),
    }


@pytest.mark.parametrize("name", streams())
def test_a_sketch_keeps_lengths_and_products(name: str) -> None:
    left, right = streams()[name]
    x, y = sketched(left), sketched(right)
    a, b = flat(left.values()), flat(right.values())
    scale = float(a.norm() * b.norm())
    for ours, theirs in ((x @ x, a @ a), (y @ y, b @ b)):
        assert float(ours) == pytest.approx(float(theirs), rel=5 * math.sqrt(2 / _sketch.WIDTH))
    assert abs(float(x @ y) - float(a @ b)) <= 5 * scale * math.sqrt(2 / _sketch.WIDTH)


@pytest.mark.parametrize("cuts", [(1,), (7, 300_000), (249_673, 249_674, 700_000)])
def test_parts_of_a_tensor_add_up_to_the_sketch_of_the_whole(cuts: tuple[int, ...]) -> None:
    data = torch.randn(900_000, generator=torch.Generator().manual_seed(0))
    whole = sketched({"w": data})
    total = torch.zeros(_sketch.BLOCK)
    ends = [0, *cuts, data.numel()]
    for start, end in itertools.pairwise(ends):
        _sketch.add_(total, data[start:end], name="w", first=start)
    torch.testing.assert_close(_sketch.fold(total), whole, rtol=1e-4, atol=1e-3)
