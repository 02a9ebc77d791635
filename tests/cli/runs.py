"""Run logs made up for the tests: known spikes, known culprits, any length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stablekit import Event
from stablekit_monitors.run_log import RunLog

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["made_up_run", "transformer_names"]

LAYER = ("norm1.weight", "attention.weight", "norm2.weight", "up.weight", "down.weight")


def transformer_names(layers: int) -> tuple[str, ...]:
    """Name the parameters of a model of so many layers."""
    body = [f"blocks.{layer}.{part}" for layer in range(layers) for part in LAYER]
    return ("embedding.weight", *body, "head.weight")


def made_up_run(
    steps: int = 300,
    names: Sequence[str] = transformer_names(2),
    *,
    spikes: Sequence[int] = (120, 210),
    nan_at: Sequence[int] = (255,),
    culprit: int = 3,
    header: dict[str, Any] | None = None,
    events: Sequence[Event] | None = None,
) -> RunLog:
    """Return a run whose loss falls; at the spikes loss and norms jump, the culprit's most."""
    rng = np.random.default_rng(0)
    number = np.arange(1, steps + 1)
    loss = 2.5 + 3 * np.exp(-8 * number / steps) + 0.1 * rng.standard_normal(steps)
    size = np.exp(rng.normal(-2, 1.2, len(names)))
    norms = size * np.exp(0.25 * rng.standard_normal((steps, len(names)), dtype=np.float32))
    present = np.ones(norms.shape, dtype=bool)
    for step in spikes:
        loss[step - 1] += 4
        norms[step - 1] *= 8
        norms[step - 1, culprit] *= 12
    for step in nan_at:
        norms[step - 1, culprit] = np.nan
    total = np.sqrt((norms.astype(np.float64) ** 2).sum(axis=1))
    threshold = np.full(steps, 1.6 * np.median([*total[np.isfinite(total)], 1.0]))
    factor = np.minimum(1, threshold / total)
    ok = np.isfinite(total)
    scalars = {
        "loss": loss, "lr": np.full(steps, 0.1), "grad_norm": total,
        "grad_norm_clipped": np.where(ok, total * factor, 0.0), "zclip/threshold": threshold,
        "zclip/factor": np.where(ok, factor, 1.0), "zclip/clipped": np.where(ok, factor < 1, 0.0),
    }  # fmt: skip
    return RunLog(
        header={
            "format": 1, "stablekit": "0.2.0", "started": "2026-11-20T10:00:00+00:00",
            "plugins": {"nonfinite-guard": "NonFiniteGuard()", "zclip": "ZClip()"},
            "optimizers": ["AdamW"], "shapes": [[10, 100]] * len(names), **(header or {}),
        },
        names=tuple(names),
        steps=number,
        scalars=scalars,
        norms=norms.astype(np.float32),
        present=present,
        ok=ok,
        has_loss=np.ones(steps, dtype=bool),
        stride=np.ones(steps, dtype=np.int64),
        events=_events(names[culprit], spikes, nan_at) if events is None else list(events),
    )  # fmt: skip


def _events(culprit: str, spikes: Sequence[int], nan_at: Sequence[int]) -> list[Event]:
    found = [
        Event("spike", step, "spike-monitor", "the loss stands out", (culprit, "head.weight"),
              {"signal": "loss", "value": 6.5, "score": 9.25})
        for step in spikes
    ]  # fmt: skip
    for step in nan_at:
        found.append(Event("nonfinite", step, "", "gradient norm is nan", (culprit,)))
        found.append(Event("skip", step, "nonfinite-guard", "not finite", (culprit,)))
    return sorted(found, key=lambda event: event.step)
