"""Lightning: a recurrent byte model on English prose; plugins come with one callback.

Run it:  python examples/lightning_trainer.py
Needs:   pip install "stablekit[lightning]"
"""

import math
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from stablekit_lightning import StableKitCallback

CONTEXT = 32
BAD = {50: math.nan, 79: 1e4}  # batch -> what multiplies the loss


class ByteModel(LightningModule):
    """Predicts the next byte."""

    def __init__(self) -> None:
        """Make one GRU of width 64."""
        super().__init__()
        self.byte = nn.Embedding(256, 64)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the loss; every 20th is printed."""
        hidden, _ = self.gru(self.byte(batch[:, :-1]))
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), batch[:, 1:].flatten())
        if batch_idx % 20 == 0:
            norm = self.trainer.callback_metrics.get("grad_norm", math.nan)
            print(f"batch {batch_idx:3}  loss {loss:.3f}  last grad norm {norm:.3g}")
        return loss * BAD.get(batch_idx, 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


seed_everything(0, verbose=False)
prose = torch.tensor(list("".join(topics.values()).encode()))
windows = prose.unfold(0, CONTEXT + 1, CONTEXT)
stable = StableKitCallback("nonfinite-guard", "zclip")
trainer = Trainer(
    max_steps=120,
    accelerator="cpu",
    callbacks=[stable],  # the one new line
    logger=False,  # with a logger, metrics and thresholds are in it too
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(ByteModel(), DataLoader(windows, batch_size=8, shuffle=True))
print(stable.session.summary())
