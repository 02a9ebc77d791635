"""The clipping methods once more, as plain float64 loops over norms, straight from the equations.

Each takes the norms of the tensors before clipping, step by step, and returns those after it. They
are written from the papers' and the reference packages' equations, not from the plugins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Norms = npt.NDArray[np.float64]


def scaled(norms: Norms, limit: float) -> Norms:
    """Clip as torch does: times ``min(1, limit / (n + 1e-6))``."""
    return norms * min(1.0, limit / (float(np.linalg.norm(norms)) + 1e-6))


def autoclip(before: Norms, percentile: float) -> Norms:
    history: list[float] = []
    after = []
    for norms in before:
        history.append(float(np.linalg.norm(norms)))
        after.append(scaled(norms, float(np.percentile(history, percentile))))
    return np.array(after)


def quantile_clip(before: Norms, quantile: float, history: int) -> Norms:
    seen: list[float] = []
    after = []
    for norms in before:
        limit = float(np.quantile(seen[-history:], quantile)) if seen else np.inf
        seen.append(float(np.linalg.norm(norms)))
        after.append(scaled(norms, limit))
    return np.array(after)


def quantile_clip_per_tensor(before: Norms, quantile: float, history: int) -> Norms:
    columns = [quantile_clip(column[:, None], quantile, history)[:, 0] for column in before.T]
    return np.array(columns).T


@dataclass
class ZClipLoop:
    """The loop of the package zclip, norm by norm."""

    z_thresh: float = 2.5
    alpha: float = 0.97
    max_grad_norm: float | None = None
    eps: float = 1e-6
    warmup_steps: int = 25
    mode: str = "zscore"
    clip_option: str = "adaptive_scaling"
    clip_factor: float = 1.0
    skip_update_on_spike: bool = False
    buffer: list[float] = field(default_factory=list)
    mean: float = float("nan")
    var: float = float("nan")

    def limit(self, n: float) -> float | None:
        sigma = math.sqrt(self.var)
        if self.mode == "percentile":
            limit = self.mean + self.z_thresh * sigma
            return limit if n > limit else None
        z = (n - self.mean) / (sigma + self.eps)
        if z <= self.z_thresh:
            return None
        if self.clip_option == "mean":
            return self.mean
        return (self.mean + self.z_thresh * sigma / (z / self.z_thresh)) * self.clip_factor

    def learn(self, x: float) -> None:
        self.mean = self.alpha * self.mean + (1 - self.alpha) * x
        self.var = self.alpha * self.var + (1 - self.alpha) * (x - self.mean) ** 2

    def after(self, n: float) -> float:
        constant = np.inf if self.max_grad_norm is None else self.max_grad_norm
        if len(self.buffer) < self.warmup_steps:
            self.buffer.append(n)
            self.mean, self.var = float(np.mean(self.buffer)), float(np.var(self.buffer))
            return n * min(1.0, constant / (n + 1e-6))
        limit = self.limit(n)
        if limit is None or not self.skip_update_on_spike:
            self.learn(n if limit is None else limit)
        allowed = min(n if limit is None else limit, constant)
        return n * allowed / (n + 1e-6) if n > allowed else n


@dataclass
class AdaGCLoop:
    """AdaGC as the authors' Paddle code has it, or as the paper has it (``paper=True``)."""

    lambda_rel: float
    beta: float
    warmup_steps: int
    paper: bool = False
    lambda_abs: float = 1.0
    gamma: dict[int, float] = field(default_factory=dict)
    step: int = 0

    def after(self, norms: Norms) -> Norms:
        total = float(np.linalg.norm(norms))
        eps = 0.0 if self.paper else 1e-8
        self.step += 1
        last = self.warmup_steps - 1 if self.paper else self.warmup_steps + 1
        if self.step <= last:
            factor = min(1.0, self.lambda_abs / (total + eps)) if total > 0 else 1.0
            for i, n in enumerate(norms):
                if n > 0:  # the references freeze the tensor here for good
                    seen = factor * n if self.paper else n
                    self.gamma[i] = min(self.gamma.get(i, np.inf), seen)
            return norms * factor
        after = norms.copy()
        for i, n in enumerate(norms):
            limit = self.lambda_rel * self.gamma[i]
            if n > limit:
                after[i] = n * limit / (n + eps)
            entered = min(n, limit)
            self.gamma[i] = self.beta * self.gamma[i] + (1 - self.beta) * entered
        return after


def agc(
    gradient: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], clipping: float, eps: float
) -> Norms:
    """Return a gradient clipped unit by unit."""
    g, w = gradient.astype(np.float64), weight.astype(np.float64)
    if g.ndim <= 1:
        whole: Norms = agc(gradient[None], weight[None], clipping, eps)[0]
        return whole
    after = np.empty_like(g)
    for u in range(len(g)):
        limit = clipping * max(float(np.linalg.norm(w[u])), eps)
        n = float(np.linalg.norm(g[u]))
        after[u] = g[u] * limit / max(n, 1e-6) if n > limit else g[u]
    return after
