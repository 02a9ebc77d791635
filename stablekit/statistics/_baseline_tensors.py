"""The rule of a robust baseline in tensor operations, which read nothing on the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stablekit.statistics import _baseline_rule as of
from stablekit.statistics._baseline_rule import Past, Verdict

if TYPE_CHECKING:
    from stablekit.statistics._baseline_rule import Rule


def judge(rule: Rule, past: Past, value: Tensor) -> Verdict:
    """Compare a value with what is usual."""
    position = value.log() if rule.is_log else value
    level = torch.where(past.seen > 0, past.level, position)
    spread = past.spread * (1.0 + of.DOUBT / (past.seen + 1))
    if rule.is_log:
        spread = spread.clamp(min=of.LOG_NOISE)
    else:
        depth = torch.maximum(level.abs(), of.DEPTH * past.highest).clamp(min=of.TINY)
        spread = torch.maximum(spread, of.NOISE * depth)
    margin = rule.threshold * of.GAUSSIAN * spread
    is_known, is_ready = (position - level).isfinite(), past.seen >= rule.warmup
    score = rule.threshold * (position - level) / margin
    score = torch.where(is_known & is_ready, score, 0.0)
    baseline, limit = level, level + margin
    if rule.is_log:
        baseline, limit = baseline.exp(), limit.exp()
    else:
        score = torch.where(value.isfinite(), score, math.inf)
    limit = torch.where(is_ready, limit, math.inf)
    return Verdict(value, score, baseline, limit, position, level, margin, is_known)


def learn(rule: Rule, past: Past, verdict: Verdict, when: Tensor) -> tuple[Past, Tensor]:
    """Return the past with a value in it where ``when``, and where the level was given up."""
    numbers: Any = verdict
    _, score, _, _, position, _, _, _ = numbers
    is_outlier = score.abs() > rule.threshold
    strain = torch.where(is_outlier, past.strain + 1, (past.strain - 1).clamp(min=0))
    gave_up = when & (strain >= rule.patience)
    enters = when & (score <= rule.threshold)
    held = past._replace(strain=torch.where(when, strain, past.strain))
    moved = _chosen(enters, _moved(rule, past, verdict, strain), held)
    none = torch.zeros_like(position)
    anew = Past(strain * 0 + 1, strain * 0, position, none, position, position.abs())
    return _chosen(gave_up, anew, moved), gave_up


def _moved(rule: Rule, past: Past, verdict: Verdict, strain: Tensor) -> Past:
    """Return the past with a value that is no outlier above."""
    seen, _, _, spread, last, highest = past
    numbers: Any = verdict
    _, _, _, _, position, level, margin, _ = numbers
    lowest = torch.where(seen >= rule.warmup, -margin, -math.inf)
    step = torch.maximum(torch.minimum(position - level, margin), lowest)
    is_up = step > 0
    own = torch.where(is_up, step, torch.minimum(-step, (position - last).abs())) * (seen > 1)
    newest = 1.0 / (seen + 1)
    level = level + step * torch.maximum(newest, torch.where(is_up, of.RISE, of.FALL))
    spread = spread + (own - spread) * newest.clamp(min=of.SPREAD)
    return Past(seen + 1, strain, level, spread, position, torch.maximum(highest, level.abs()))


def _chosen(condition: Tensor, chosen: Past, otherwise: Past) -> Past:
    pairs = zip(chosen, otherwise, strict=True)
    return Past(*(torch.where(condition, *pair) for pair in pairs))
