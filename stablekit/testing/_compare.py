"""What the checks compare with, and how they say that something differs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stablekit._seats import check_hooks
from stablekit.errors import HookError
from stablekit.hookspecs import Plugin


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_known_hooks(plugin: Plugin) -> None:
    """Require hooks that exist; the message names the nearest one."""
    try:
        check_hooks(plugin)
    except HookError as error:
        raise AssertionError(str(error)) from error


def require_same(ours: list[Tensor], theirs: list[Tensor], message: str) -> None:
    """Require tensors of the same bits."""
    pairs = zip(ours, theirs, strict=True)
    require(all(torch.equal(a, b) for a, b in pairs), message)


def require_equal(ours: Any, theirs: Any, message: str) -> None:  # noqa: ANN401 - any plain state
    """Require nested plain state to be the same, bit by bit."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        require(torch.equal(ours, theirs), message)
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        require(ours.keys() == theirs.keys(), message)
        for key in ours:
            require_equal(ours[key], theirs[key], f"{message}: {key}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        require(len(ours) == len(theirs), message)
        for a, b in zip(ours, theirs, strict=True):
            require_equal(a, b, message)
    else:
        require(ours == theirs, f"{message}: {ours!r} is not {theirs!r}")


def tensors_in(value: Any, *, nan_only: bool = False) -> list[Tensor]:  # noqa: ANN401 - any plain state
    """Collect every number and tensor in nested state; infinite "not seen yet" marks may pass."""
    if isinstance(value, Tensor):
        found = [value.float()]
    elif isinstance(value, float):
        found = [torch.tensor(value)]
    elif isinstance(value, dict):
        found = [t for item in value.values() for t in tensors_in(item)]
    elif isinstance(value, list):
        found = [t for item in value for t in tensors_in(item)]
    else:
        found = []
    if not nan_only:
        return found
    return [torch.nan_to_num(t, nan=math.nan, posinf=0.0, neginf=0.0) for t in found]


def require_finite(tensors: list[Tensor], message: str) -> None:
    """Require tensors without NaN and Inf."""
    require(all(bool(tensor.isfinite().all()) for tensor in tensors), message)
