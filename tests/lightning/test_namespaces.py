"""Both names under which Lightning is published."""

from __future__ import annotations

import inspect
import runpy
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")
pytest.importorskip("pytorch_lightning", reason="the older name of Lightning is not installed")

import pytorch_lightning as classic

from stablekit_lightning import StableKitCallback
from tests.lightning.modules import HOST_WARNINGS, batch_loss, network, weights_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = HOST_WARNINGS


def test_the_trainer_of_pytorch_lightning_takes_the_callback_too(tmp_path: Path) -> None:
    class Classic(classic.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return batch_loss(self.net, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    def fit(epochs: int, path: str | None = None) -> tuple[Any, StableKitCallback, Any]:
        callback, module = StableKitCallback("nonfinite-guard", "zclip"), Classic()
        callbacks: list[Any] = [callback]  # not a classic.Callback, but all that Trainer calls
        trainer = classic.Trainer(
            callbacks=callbacks,
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(range(4)), ckpt_path=path)  # type: ignore[arg-type]
        return trainer, callback, module

    path = str(tmp_path / "run.ckpt")
    trainer, callback, module = fit(1)
    trainer.save_checkpoint(path)
    assert weights_of(module).isfinite().all()
    assert (callback.session.number, callback.session.skipped) == (4, 1)
    _, callback, _ = fit(2, path)
    assert (callback.session.number, callback.session.skipped) == (8, 2)


def test_pytorch_lightning_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    file = inspect.getsourcefile(StableKitCallback)
    assert file is not None
    found = runpy.run_path(file)["StableKitCallback"]
    assert issubclass(found, classic.Callback)
    assert not issubclass(StableKitCallback, classic.Callback)
