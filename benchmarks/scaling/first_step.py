"""The first step of a session, at which ranks meet in the store to compare what they attached."""

from __future__ import annotations

from collections import Counter
from typing import Any, final
from unittest import mock

import torch
from torch.distributed import distributed_c10d
from torch.nn import Parameter

import stablekit

REQUESTS = 8
"""What a rank asks of the store: a number, its kind, places, arrival, waiting, what it found."""

_STORE = "_get_default_store"


def at_store(ranks: int) -> int:
    """Return how many requests the process that keeps the store answers.

    Three more come from single ranks: the first writes down what is attached, the last that all
    are there. One rank alone asks nothing.

    Example:
        >>> at_store(10_240)
        81923
    """
    return REQUESTS * ranks + 3 if ranks > 1 else 0


def requests() -> int:
    """Count what this rank asks of the store in a first step; every rank must call it."""
    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = stablekit.wrap(torch.optim.SGD([param], lr=0.0), "zclip")
    store = _Counted(distributed_c10d._get_default_store())
    with mock.patch.object(distributed_c10d, _STORE, return_value=store):
        optimizer.step()
    return store.asked.total()


@final
class _Counted:
    """A store that counts what it is asked."""

    def __init__(self, store: Any) -> None:  # noqa: ANN401 - any kind of store
        self._store = store
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a method of the store
        """Count a use of a method."""
        self.asked[name] += 1
        return getattr(self._store, name)
