"""Where metrics go: the Trainer's loggers, and everything that reads ``callback_metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from stablekit_lightning import StableKitCallback
from tests.lightning.modules import HOST_WARNINGS, Listener, Regression, fit

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = HOST_WARNINGS


class Kept(DummyLogger):
    """Keeps what was logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)


class LogsItsLoss(Regression):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.log("loss", loss * 0 + 7.0)
        return loss


def test_every_logger_gets_true_norms_thresholds_and_skips_of_the_step() -> None:
    loggers, listener = [Kept(), Kept()], Listener()
    callback = StableKitCallback("nonfinite-guard", "global-norm:max_norm=0.05", listener)
    fit(LogsItsLoss({5: float("nan")}), callback, logger=loggers, log_every_n_steps=1)
    for logger in loggers:
        assert sorted(logger.rows) == list(range(8))
        norms = [logger.rows[step]["grad_norm"] for step in range(5)]
        assert norms == pytest.approx(listener.norms[:5])
        row = logger.rows[4]
        assert row["grad_norm_clipped"] == pytest.approx(0.05, rel=1e-3)
        assert row["global-norm/clipped"] == 1
        assert row["step_loss"] == pytest.approx(listener.losses[4])
        assert row["loss"] == 7
        assert [logger.rows[step]["steps_skipped"] for step in range(8)] == [0.0] * 5 + [1.0] * 3


def test_metrics_are_read_as_often_as_log_every_says_and_written_as_often_as_lightning_says() -> (
    None
):
    logger = Kept()
    callback = StableKitCallback("zclip", log_every=4)
    trainer = fit(Regression(), callback, logger=logger, log_every_n_steps=4, batches=10)
    assert sorted(logger.rows) == [3, 7]
    assert "zclip/threshold" in logger.rows[7]
    assert "grad_norm" in trainer.callback_metrics

    silent = Kept()
    fit(Regression(), StableKitCallback("zclip", log_every=0), logger=silent, log_every_n_steps=1)
    assert not silent.rows


def test_steps_of_accumulated_batches_are_logged_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = StableKitCallback("zclip")
    fit(Regression(), callback, logger=logger, accumulate_grad_batches=4, log_every_n_steps=1)
    header, *rows = lines_of(tmp_path)
    assert "grad_norm_clipped" in header
    assert len(rows) == 2


def lines_of(folder: Path) -> list[str]:
    (file,) = folder.rglob("metrics.csv")
    return file.read_text(encoding="utf-8").splitlines()
