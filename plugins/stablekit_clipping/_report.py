"""What clippers with one factor a tensor or unit report of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stablekit.scalars import where

if TYPE_CHECKING:
    from stablekit import Step
    from stablekit.scalars import Scalar


def report_factor(step: Step, factor: Scalar) -> None:
    """Record one factor for all tensors; NaN counts as 1, as it acts."""
    step.record("factor", where(factor == factor, factor, 1.0))
    step.record("clipped", factor < 1)


def report_factors(step: Step, factors: Tensor) -> None:
    """Record the smallest of several factors and the share of those below 1."""
    if not factors.numel():
        report_factor(step, 1.0)
        return
    step.record("factor", factors.nan_to_num(1.0).min())
    step.record("clipped", (factors < 1).float().mean())
