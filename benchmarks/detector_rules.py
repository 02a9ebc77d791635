"""Rules that say of every step whether it is a spike: SpikeMonitor, and those of other projects."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import stablekit
from stablekit.statistics import RobustBaseline
from stablekit_monitors import SpikeMonitor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Values = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Rule = Callable[[Values, str], Flags]


def spike_monitor(**arguments: Any) -> Rule:  # noqa: ANN401 - those of SpikeMonitor
    """Return SpikeMonitor, attached to an optimizer whose loss or gradient norm is the stream."""

    def flags(values: Values, signal: str) -> Flags:
        monitor = SpikeMonitor(signals=(signal,), **arguments)
        param = torch.nn.Parameter(torch.zeros(()))
        session = stablekit.attach(torch.optim.SGD([param], lr=0.0), monitor)
        said = np.zeros(len(values), dtype=bool)
        for t, value in enumerate(values.tolist()):
            param.grad = torch.tensor(value if signal == "norm" else 1.0)
            session.observe(loss=value if signal == "loss" else None)
            session.optimizers[0].step()
            said[t] = session.metrics()[f"spike-monitor/{signal}_score"] > monitor.threshold
        return said

    return flags


def robust_baseline(threshold: float = 6.0) -> Rule:
    """Return what SpikeMonitor decides by, without training anything: the same flags, faster."""

    def flags(values: Values, signal: str) -> Flags:
        usual = RobustBaseline(
            threshold=threshold,
            warmup=20,
            patience=20,
            scale="linear" if signal == "loss" else "log",
        )
        said = np.zeros(len(values), dtype=bool)
        for t, value in enumerate(values.astype(np.float32).tolist()):
            verdict = usual.judge(value)
            usual.learn(verdict, when=True)
            said[t] = verdict.score > threshold
        return said

    return flags


def olmo_core(window: int = 128, sigma: float = 6.0) -> Rule:
    """Return the rule by which OLMo-core skips a step.

    ``not (x - mean <= 6 * std)`` over the last 128 values, whatever they were, once there are 64.
    """

    def flags(values: Values, signal: str) -> Flags:
        said = np.zeros(len(values), dtype=bool)
        for t in range(max(1, window // 2 - 1), len(values)):
            past = values[max(0, t - window) : t]
            with np.errstate(invalid="ignore"):
                said[t] = not values[t] - past.mean() <= sigma * past.std(ddof=1)
        return said

    return flags


def lightning(window: int = 10, rtol: float = 2.0) -> Rule:
    """Return the rule of Lightning's SpikeDetection with its defaults.

    A value is a spike if it is not finite, or is above the last one and further than twice the mean
    of the last 10 from that mean. Lightning then ends the run; here the run goes on, and spikes do
    not enter the mean.
    """

    def flags(values: Values, signal: str) -> Flags:
        said = np.zeros(len(values), dtype=bool)
        past: deque[float] = deque(maxlen=window)
        for t, value in enumerate(values.tolist()):
            mean = sum(past) / len(past) if past else math.nan
            is_far = bool(past) and value > past[-1] and abs(value - mean) >= rtol * mean
            said[t] = bool(past) and (not math.isfinite(value) or is_far)
            if not said[t] and math.isfinite(value):
                past.append(value)
        return said

    return flags


RULES: dict[str, Rule] = {
    "SpikeMonitor": spike_monitor(),
    "OLMo-core": olmo_core(),
    "Lightning": lightning(),
}
