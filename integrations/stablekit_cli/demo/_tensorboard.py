"""TensorBoard logs of the demo: one folder per arm, so that the curves share a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from stablekit_cli.demo._training import Record, Run

__all__ = ["write_tensorboard"]


def write_tensorboard(root: Path, run: Run) -> None:
    """Write the curves of one arm below ``root`` and remove those of an earlier demo there."""
    from torch.utils.tensorboard import SummaryWriter

    folder = root / run.arm.slug
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    writer = SummaryWriter(str(folder))
    for record in run.records:
        for tag, value in _scalars(record).items():
            writer.add_scalar(tag, value, record.step)
    for step, incident in run.incidents:
        text = f"{incident.kind}: {incident.message}"
        writer.add_text("events", text, step)
    writer.close()


def _scalars(record: Record) -> dict[str, float]:
    reading = record.reading
    threshold = {} if reading.threshold is None else {"clip/threshold": reading.threshold}
    return {
        "train/loss": record.loss,
        "train/grad_norm": reading.grad_norm,
        "clip/clipped": reading.clipped,
        "clip/skipped": float(reading.skipped),
        "time/step_ms": record.milliseconds,
        **threshold,
    }
