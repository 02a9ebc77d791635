"""FSDP1, whose parameters are shards that look like whole tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import stablekit
from stablekit.errors import AttachError


def flat(rank: int, world: int) -> dict[str, str]:
    """Return how a session is refused, attached after FSDP1 and before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have an accelerator
        return {
            "original parameters": _attached_after(use_orig_params=True),
            "flat parameters": _attached_after(use_orig_params=False),
            "attached before": _attached_before(),
        }


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def _wrapped(net: nn.Module, **options: Any) -> nn.Module:  # noqa: ANN401 - those of FSDP1
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


def _attached_after(*, use_orig_params: bool) -> str:
    model = _wrapped(_net(), use_orig_params=use_orig_params)
    return _refusal(torch.optim.SGD(model.parameters(), lr=0.1), model)


def _attached_before() -> str:
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stablekit.attach(optimizer, "global-norm")
    model = _wrapped(net, use_orig_params=True)
    model(torch.ones(2, 4)).sum().backward()
    try:
        optimizer.step()
    except AttachError as error:
        return str(error)
    return "not refused"


def _refusal(optimizer: torch.optim.Optimizer, model: nn.Module) -> str:
    try:
        stablekit.attach(optimizer, "global-norm", model=model)
    except AttachError as error:
        return str(error)
    return "not refused"
