"""Rows: QK-Clip after the update against a loop over heads; for information."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import stablekit
from benchmarks.interleave import Case
from benchmarks.table import Row
from benchmarks.workloads import BLOCKS, GPT2
from stablekit_updates import QKClip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.effort import Effort
    from benchmarks.workloads import Workload

HEADS = 12
_SETTINGS = {"query": "*", "key": "*", "fused": True, "logits": "bound"}


def rows(workload: Workload, effort: Effort) -> Iterator[Row]:
    """Measure what clipping adds to a step that is free, on the attention weights of a GPT-2.

    Before every step, untimed, weights are restored and queries and keys of two tokens made, so
    that every head has a maximum again; looking at them there is what costs more the more tokens
    there are.
    """
    maxima = torch.full((BLOCKS, HEADS), 1e3)
    for threshold, what in ((1e9, "nothing clipped"), (1e-6, "every head clipped")):
        model, bare_model, theirs = (_model(workload) for _ in range(3))
        clip = QKClip(threshold, **_settings(workload))
        ours = stablekit.wrap(_free(model), clip, model=model)
        bare = stablekit.wrap(_free(bare_model))
        cases = [
            Case("bare", bare.step, _forward(bare_model)),
            Case("ours", ours.step, _forward(model)),
            Case("loop", partial(_loop, theirs, maxima, threshold), _forward(theirs)),
        ]
        slow = workload.name == GPT2.name
        timings = effort.time(cases, effort.repetitions(workload, slow=slow))
        name = f"qk-clip, {what}"
        added = timings.added("ours", "bare")
        yield Row(name, added, workload.name, "a loop over heads", timings.median("loop"))


def _settings(workload: Workload) -> dict[str, Any]:
    return {**_SETTINGS, "head_dim": max(1, workload.width // HEADS)}


def _model(workload: Workload) -> nn.ModuleList:
    width = max(1, workload.width // HEADS) * HEADS
    return nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(BLOCKS))


def _free(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of parameters without gradients: its step does nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def _forward(model: nn.ModuleList) -> Callable[[], None]:
    source = {name: value.clone() for name, value in model.state_dict().items()}
    first: Any = model[0]
    x = torch.ones(1, 2, first.in_features)

    def run() -> None:
        model.load_state_dict(source)
        for layer in model:
            layer(x)

    return run


@torch.no_grad()
def _loop(model: nn.ModuleList, maxima: Tensor, threshold: float) -> None:
    """Clip as it is written down: layer by layer, head by head."""
    layers: list[Any] = [*model]
    for layer, found in zip(layers, maxima.tolist(), strict=True):
        width = layer.out_features // 3
        length = width // HEADS
        for head, largest in enumerate(found):
            gamma = min(1.0, threshold / largest) if largest > 0 else 1.0
            if gamma < 1:
                for start in (head * length, width + head * length):
                    layer.weight[start : start + length] *= gamma**0.5
                    layer.bias[start : start + length] *= gamma**0.5
