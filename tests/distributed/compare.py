"""Comparing what runs saw: bit by bit, or within a tolerance."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, testing


def assert_same(left: Any, right: Any, *, within: float = 0.0, path: str = "") -> None:  # noqa: ANN401 - plain data
    """Compare plain data; NaN equals NaN. ``within`` is relative to a tensor's largest."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), f"{path}: {sorted(left)} != {sorted(right)}"
        for key, value in left.items():
            assert_same(value, right[key], within=within, path=f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{path}: {left} != {right}"
        for i, value in enumerate(left):
            assert_same(value, right[i], within=within, path=f"{path}[{i}]")
    elif isinstance(left, Tensor):
        scale = max(
            [x for x in right.double().abs().ravel().tolist() if math.isfinite(x)], default=0.0
        )
        testing.assert_close(
            left,
            right,
            rtol=within,
            atol=within * scale,
            equal_nan=True,
            msg=lambda said: f"{path}: {said}",
        )
    elif isinstance(left, float) and isinstance(right, float):
        is_close = math.isclose(left, right, rel_tol=within, abs_tol=within * 1e-3)
        assert is_close or (math.isnan(left) and math.isnan(right)), f"{path}: {left} != {right}"
    else:
        assert left == right, f"{path}: {left} != {right}"
