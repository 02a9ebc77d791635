"""A loop as users of Accelerate write it, around a small model in which things go wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor, nn

import stablekit
import stablekit_accelerate

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Step

NAN = float("nan")


class Watch:
    """Keeps what plugins get to see."""

    name = "watch"

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float | None] = []
        self.learned: list[float] = []

    @stablekit.hookimpl
    def observe_gradients(self, step: Step) -> None:
        self.norms.append(float(step.gradients.raw_norm()))
        self.losses.append(None if step.loss is None else float(step.loss))


class Notebook(GeneralTracker):  # type: ignore[misc]  # published without annotations
    """A tracker that keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.pages

    @on_main_process  # type: ignore[untyped-decorator, unused-ignore]
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:  # noqa: ANN401
        self.pages.append((step, values))


class Prepared(NamedTuple):
    """What a script has in its hands when training begins."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    session: stablekit.Session


def forget() -> None:
    """Undo what one Accelerator leaves behind for the next."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def adamw(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - of AdamW
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.05, **changes})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def prepared(
    *plugins: Any,  # noqa: ANN401 - as stablekit.attach
    attach: Callable[..., stablekit.Session] = stablekit_accelerate.attach,
    first: str = "prepare",
    make: Callable[[nn.Module], Any] = adamw,
    accelerator: Any = None,  # noqa: ANN401 - an Accelerator
    **options: Any,  # noqa: ANN401 - as attach
) -> Prepared:
    """Attach before or after ``prepare``."""
    accelerator = accelerator or Accelerator(cpu=True)
    model = network()
    optimizer = make(model)
    if first == "attach":
        session = attach(accelerator, optimizer, *plugins, model=model, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first == "prepare":
        session = attach(accelerator, optimizer, *plugins, model=model, **options)
    return Prepared(accelerator, model, optimizer, session)


def batch(number: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(number)
    return torch.randn(6, 4, generator=make), torch.randn(6, 1, generator=make)


def loss_of(model: nn.Module, number: int, gain: float = 1.0) -> Tensor:
    x, y = batch(number)
    return nn.functional.mse_loss(model(x), y) * gain


def train(
    kit: Prepared,
    *gains: float,
    limit: float | None = None,
    scheduler: Any = None,  # noqa: ANN401 - prepared or not
) -> list[Tensor]:
    """Train on one batch for each gain; return what ``clip_grad_norm_`` returned."""
    norms = []
    for number, gain in enumerate(gains):
        with kit.accelerator.accumulate(kit.model):
            kit.accelerator.backward(loss_of(kit.model, number, gain))
            if limit is not None and kit.accelerator.sync_gradients:
                norms.append(kit.accelerator.clip_grad_norm_(kit.model.parameters(), limit))
            kit.optimizer.step()
            if scheduler is not None:
                scheduler.step()
            kit.optimizer.zero_grad()
    return norms


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()]).clone()
