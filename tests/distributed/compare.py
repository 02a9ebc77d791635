"""Comparing what runs saw: bit by bit, or within a tolerance."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, testing


def assert_same(
    left: Any,  # noqa: ANN401 - plain data
    right: Any,  # noqa: ANN401 - plain data
    *,
    within: float = 0.0,
    path: str = "",
    scale: float = 0.0,
) -> None:
    """Compare plain data; NaN equals NaN.

    Args:
        left: nested data.
        right: what it should be.
        within: by how much numbers may differ, as a share of the largest of their kind: of a
            tensor, or of the numbers in one table.
        path: where in the data this is.
        scale: the largest of the kind, for a single number.
    """
    if isinstance(left, dict):
        assert left.keys() == right.keys(), f"{path}: {sorted(left)} != {sorted(right)}"
        largest = _largest([value for value in right.values() if isinstance(value, float)])
        for key, value in left.items():
            assert_same(value, right[key], within=within, path=f"{path}/{key}", scale=largest)
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{path}: {left} != {right}"
        for i, value in enumerate(left):
            assert_same(value, right[i], within=within, path=f"{path}[{i}]")
    elif isinstance(left, Tensor):
        testing.assert_close(
            left,
            right,
            rtol=within,
            atol=within * _largest(right.double().ravel().tolist()),
            equal_nan=True,
            msg=lambda said: f"{path}: {said}",
        )
    elif isinstance(left, float) and isinstance(right, float):
        is_close = math.isclose(left, right, rel_tol=within, abs_tol=within * scale)
        assert is_close or (math.isnan(left) and math.isnan(right)), f"{path}: {left} != {right}"
    else:
        assert left == right, f"{path}: {left} != {right}"


def _largest(values: list[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)
