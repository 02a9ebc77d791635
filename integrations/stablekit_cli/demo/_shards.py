"""Workload ``shards``: a byte-level transformer on Python's own files, compiled ones among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from stablekit_cli.demo._corpus import Corpus, freeze
from stablekit_cli.demo._transformer import ByteTransformer
from stablekit_cli.demo._windows import held_out_windows, to_tensor, windows
from stablekit_cli.demo._workload import Facts

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Shards"]

CONTEXT = 64
BATCH = 16


class Shards:
    """Every batch reads one file; now and then the file is compiled code, and nobody says so."""

    def __init__(self, corpus: Corpus | None = None, *, adam: bool = False) -> None:
        corpus = freeze() if corpus is None else corpus
        self._adam = adam
        self.facts = Facts(
            name="shards-adamw" if adam else "shards",
            title=(
                "byte-level pre-LN transformer (4 layers, width 64, context 64) on Python's own "
                "files, compiled ones among the sources; "
                + ("AdamW lr 0.01" if adam else "SGD lr 0.3, momentum 0.9")
            ),
            data=corpus.describe(),
            unit="nats per byte",
            steps=350,
            settled=1 / 7,
            injected_tensor="blocks.2.up.weight",
            keywords={
                "qk-clip": "query=blocks.*.qkv,key=blocks.*.qkv,layers=blocks.*,fused=true",
                **dict.fromkeys(("soft-cap", "z-loss"), "on=head"),
            },
        )
        self._files = [to_tensor(file.read()) for file in (*corpus.sources, *corpus.compiled)]
        self._held_out = held_out_windows([file.read() for file in corpus.held_out], CONTEXT)

    def model(self) -> nn.Module:
        """Build the transformer."""
        return ByteTransformer(width=64, layers=4, heads=4, context=CONTEXT)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build SGD with momentum, or AdamW."""
        if self._adam:
            return torch.optim.AdamW(model.parameters(), lr=0.01)
        return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    def loss(self, model: nn.Module, order: torch.Generator) -> torch.Tensor:
        """Return the loss of 16 windows of one file."""
        drawn = int(torch.randint(len(self._files), (1,), generator=order))
        return _loss(model, windows(self._files[drawn], CONTEXT, BATCH, order))

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """Return the loss on windows of source files that are never trained on."""
        return _loss(model, self._held_out).item()


def _loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
