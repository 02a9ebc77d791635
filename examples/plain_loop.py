"""A plain PyTorch loop: a byte-level transformer on English prose, with two bad batches.

Run it:  python examples/plain_loop.py
Needs:   pip install stablekit
"""

import math
from pydoc_data.topics import topics

import torch
from torch import nn

import stablekit

STEPS, BATCH, CONTEXT, WIDTH = 120, 8, 32, 64
BAD = {50: math.nan, 80: 1e4}  # step -> what multiplies the loss


class ByteModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        """Make one layer."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.byte = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the logits of the byte that follows each byte."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.byte(text) + self.place.weight[: text.shape[1]]
        logits: torch.Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return logits


torch.manual_seed(0)
prose = torch.tensor(list("".join(topics.values()).encode()))
model = ByteModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
plugins = ("nonfinite-guard", "zclip:max_grad_norm=5")
session = stablekit.attach(optimizer, *plugins, model=model)  # the one new line

for step in range(1, STEPS + 1):
    starts = torch.randint(len(prose) - CONTEXT - 1, (BATCH, 1))
    window = prose[starts + torch.arange(CONTEXT + 1)]
    loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
    (loss * BAD.get(step, 1.0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        norm, clipped = (session.metrics()[key] for key in ("grad_norm", "grad_norm_clipped"))
        print(f"step {step:3}  loss {loss:.3f}  grad norm {norm:.3g}, clipped to {clipped:.3g}")

print(session.summary())
