"""What is trained: small models with awkward tensors, on batches with a spike and a NaN."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

STEPS = 12
SPIKE, BAD_BATCH, BAD_SHARD = 6, 9, 10
HALF_WAY = 7
COUNTED = 4


@final
class Model(nn.Module):
    """Tensors that do not cut evenly: 5 rows, 3 kernels, 1 row, 1 element; and one never used."""

    def __init__(self) -> None:
        """Make the same weights everywhere."""
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 5)
        self.conv = nn.Conv1d(1, 3, 3)
        self.query = nn.Linear(8, 4)
        self.key = nn.Linear(8, 4, bias=False)  # softmax would leave a bias nothing but rounding
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        self.idle = nn.Linear(3, 2)
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.loss = nn.CrossEntropyLoss()

    def judge(self, said: Tensor, labels: Tensor) -> Tensor:
        """Return how badly the sign of what was said tells one class from the other."""
        judged: Tensor = self.loss(torch.cat([said, -said], 1), labels)
        return judged

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 8] to [n, 1]."""
        inner = self.norm(torch.tanh(self.first(x)))
        attention = torch.softmax(self.query(x) @ self.key(x).mT / 2, dim=-1)
        hidden = attention @ inner + self.conv(x[:, None, :7]).tanh().mean(1)
        result: Tensor = self.last(hidden) * self.logit_scale
        return result


@final
class Fleet(nn.Module):
    """Models that see the same batches and share nothing but the engine that carries them.

    So many chains of plugins are trained for the communication of one.
    """

    def __init__(self, count: int) -> None:
        """Make equal models."""
        super().__init__()
        self.models = [Model() for _ in range(count)]
        self.members = nn.ModuleList(self.models)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return what each model says."""
        return [member(x) for member in self.members]


def losses_of(fleet: nn.Module, step: int, shard: int, world: int, *, faults: bool) -> list[Tensor]:
    """Return each model's loss on one rank's batch.

    That of step SPIKE is large everywhere; in step BAD_BATCH that of the last rank is NaN.
    """
    make = torch.Generator().manual_seed(100 * step + shard)
    x, y = torch.randn(4, 8, generator=make), torch.randn(4, 1, generator=make)
    dtype = next(fleet.parameters()).dtype
    x, y = x.to(dtype), y.to(dtype)
    if faults and step == BAD_BATCH and shard == world - 1:
        x[0, 0] = torch.nan
    gain = 300.0 if step == SPIKE else 1.0 + 0.1 * step
    members = [module for module in fleet.modules() if isinstance(module, Model)]
    labels = (y[:, 0] > 0).long()
    return [
        (nn.functional.mse_loss(said, y) + 0.1 * member.judge(said, labels)) * gain
        for member, said in zip(members, fleet(x), strict=True)
    ]
