"""Small modules to fit with Lightning, whose data depends on nothing but the number of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stablekit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning.pytorch import Callback
    from torch.optim import Optimizer

# What lightning 2.6 warns of, whatever one does with it.
HOST_WARNINGS = [
    # Its own use of torch.utils._pytree with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    # A range of eight numbers needs no worker process.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # The batches follow from the number of the step, wherever a loader begins.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the"),
]

FAULTLESS: Mapping[int, float] = {}


def network() -> nn.Sequential:
    """Return the same small network every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batch_loss(net: nn.Module, batch: int) -> Tensor:
    """Return the loss of a network on a batch that is made from its number."""
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(batch))
    loss: Tensor = (net(data).float() - data.sum(1, keepdim=True)).square().mean()
    return loss


def weights_of(module: nn.Module) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return an AdamW whose steps are easily seen."""
    return torch.optim.AdamW(params, lr=0.01)


class Regression(LightningModule):
    """Fits :func:`network`; ``faults`` maps batch numbers to what multiplies their loss."""

    def __init__(
        self,
        faults: Mapping[int, float] = FAULTLESS,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adamw,
    ) -> None:
        super().__init__()
        self.net = network()
        self.faults = faults
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        number = int(batch)
        return batch_loss(self.net, number) * self.faults.get(number, 1.0)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


class ByHand(LightningModule):
    """Manual optimization of two optimizers, which step together or take turns."""

    def __init__(self, *, take_turns: bool, forgets_one: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.automatic_optimization = False
        self.take_turns = take_turns
        self.forgets_one = forgets_one

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        number, optimizers = int(batch), self.optimizers()
        assert isinstance(optimizers, list)
        if self.take_turns:
            optimizers = [optimizers[number % 2]]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(batch_loss(self.net, number) * (10.0 if number % 2 else 1.0))
        for optimizer in optimizers[: 1 if self.forgets_one else 2]:
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p.ndim != 2]
        return [torch.optim.Muon(matrices, lr=0.01), adamw(others)]


class Listener:
    """A plugin that keeps what it heard of every step."""

    def __init__(self, *, name: str = "listener") -> None:
        self.name = name
        self.losses: list[float] = []
        self.norms: list[float] = []

    @stablekit.hookimpl
    def on_step_end(self, step: stablekit.Step) -> None:
        self.losses.append(float("nan") if step.loss is None else float(step.loss))
        self.norms.append(float(step.gradients.raw_norm()))


def fit(
    module: LightningModule,
    *callbacks: Callback,
    batches: int = 8,
    ckpt_path: str | None = None,
    **options: Any,  # noqa: ANN401 - of Trainer
) -> Trainer:
    """Fit a module on batches 0, 1, 2, ... and return the Trainer."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        **options,
    }
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, numbers(batches), ckpt_path=ckpt_path)
    return trainer


def numbers(count: int) -> DataLoader[Any]:
    """Return a loader of the numbers from 0, one a batch."""
    return DataLoader(range(count), batch_size=1)  # type: ignore[arg-type]
