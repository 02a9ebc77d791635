"""``results.json``: everything the demo measured, as strict JSON."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from stablekit_cli.demo._checks import comparisons, failures, fate
from stablekit_cli.demo._summary import summarize

if TYPE_CHECKING:
    from pathlib import Path

    from stablekit_cli.demo._training import Plan, Run
    from stablekit_cli.demo._workload import Facts

__all__ = ["write_results"]


def write_results(path: Path, runs: list[Run], plan: Plan, facts: Facts) -> None:
    """Write the file; non-finite numbers become the strings "nan", "inf" and "-inf"."""
    content = {
        "workload": asdict(facts),
        "seed": plan.seed,
        "steps": plan.steps,
        "injected": {"step": plan.injected_step, "tensor": facts.injected_tensor},
        "environment": _environment(),
        "comparisons": comparisons(runs, plan, facts),
        "arms": [_arm(run, plan, facts) for run in runs],
    }
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", "utf-8")


def _environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _arm(run: Run, plan: Plan, facts: Facts) -> dict[str, Any]:
    return {
        "arm": run.arm.label,
        "chain": run.arm.chain,
        "fate": fate(run, plan, facts),
        "failed_checks": failures(run, plan, facts),
        "died_at": run.died_at,
        "cause": run.cause,
        "held_out_start": run.held_out_start,
        "held_out_before_injection": run.held_out_before,
        "held_out_end": run.held_out_end,
        **asdict(summarize(run, plan, facts)),
        "skipped_steps": run.skipped_steps,
        "incidents": [{"step": step, **asdict(one)} for step, one in run.incidents],
        "history": {
            "loss": [record.loss for record in run.records],
            "grad_norm": [record.reading.grad_norm for record in run.records],
            "threshold": [record.reading.threshold for record in run.records],
            "clipped": [record.reading.clipped for record in run.records],
            "milliseconds": [record.milliseconds for record in run.records],
        },
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is recursive
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
