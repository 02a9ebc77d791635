"""The rule of a robust baseline in plain numbers: a microsecond, where tensors take a hundred."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stablekit.statistics import _baseline_rule as of
from stablekit.statistics._baseline_rule import Past, Verdict

if TYPE_CHECKING:
    from stablekit.statistics._baseline_rule import Rule

_LARGEST_EXPONENT = 700.0


def judge(rule: Rule, past: Past, value: float) -> Verdict:
    """Compare a value with what is usual."""
    seen, _, level, spread, _, highest = past
    position = _log(value) if rule.is_log else value
    level = level if seen else position
    least = of.NOISE * max(abs(level), of.DEPTH * highest, of.TINY)
    spread *= 1.0 + of.DOUBT / (seen + 1)
    margin = rule.threshold * of.GAUSSIAN * max(spread, of.LOG_NOISE if rule.is_log else least)
    is_known, is_ready = math.isfinite(position - level), seen >= rule.warmup
    score = 0.0
    if not rule.is_log and not math.isfinite(value):
        score = math.inf
    elif is_known and is_ready:
        score = rule.threshold * (position - level) / margin
    baseline, limit = level, level + margin
    if rule.is_log:
        baseline, limit = _exp(level), _exp(limit)
    limit = limit if is_ready else math.inf
    return Verdict(value, score, baseline, limit, position, level, margin, is_known)


def learn(rule: Rule, past: Past, verdict: Verdict) -> tuple[Past, bool]:
    """Return the past with a value in it that is known, and whether the level was given up."""
    numbers: Any = verdict
    _, score, _, _, position, _, _, _ = numbers
    strain = past.strain + 1 if abs(score) > rule.threshold else max(past.strain - 1, 0)
    if strain >= rule.patience:
        return Past(1, 0, position, 0.0, position, abs(position)), True
    if score > rule.threshold:
        return past._replace(strain=strain), False
    return _moved(rule, past, verdict, strain), False


def _moved(rule: Rule, past: Past, verdict: Verdict, strain: int) -> Past:
    """Return the past with a value that is no outlier above."""
    seen, _, _, spread, last, highest = past
    numbers: Any = verdict
    _, _, _, _, position, level, margin, _ = numbers
    step = min(position - level, margin)
    if seen >= rule.warmup:
        step = max(step, -margin)
    own = step if step > 0 else min(-step, abs(position - last))
    newest = 1.0 / (seen + 1)
    level += step * max(newest, of.RISE if step > 0 else of.FALL)
    spread += ((own if seen > 1 else 0.0) - spread) * max(newest, of.SPREAD)
    return Past(seen + 1, strain, level, spread, position, max(highest, abs(level)))


def _log(a: float) -> float:
    return math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan)


def _exp(a: float) -> float:
    return math.exp(a) if a < _LARGEST_EXPONENT else a * math.inf
