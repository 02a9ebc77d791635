"""What the training loop called its batches, for as long as a run may go back over them."""

from __future__ import annotations

from collections import deque
from numbers import Integral, Real
from typing import Any, final

from torch import Tensor

_MOST = 10_000
_LONG = 1024
_NAMED = 5
_SHOWN = 40


@final
class Batches:
    """Step number and batch of the latest steps."""

    def __init__(self) -> None:
        """Start with none."""
        self._seen: deque[tuple[int, Any]] = deque(maxlen=_MOST)

    def add(self, number: int, batch: Any) -> None:  # noqa: ANN401 - whatever was observed
        """Note the batch of a step, if the loop told."""
        if batch is not None:
            self._seen.append((number, plain(batch)))

    def since(self, number: int) -> list[Any]:
        """Return the batches of all steps after this one, oldest first."""
        return [batch for step, batch in self._seen if step > number]

    def forget_until(self, number: int) -> None:
        """Drop those of this step and before."""
        while self._seen and self._seen[0][0] <= number:
            self._seen.popleft()


def plain(value: Any) -> Any:  # noqa: ANN401 - any batch description
    """Return a description in plain values; what is large or lives on a device is only named.

    Example:
        >>> plain({"shard": 3, "rows": (4, 5)})
        {'shard': 3, 'rows': [4, 5]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor):
        is_near = value.device.type == "cpu" and value.numel() <= _LONG
        return value.tolist() if is_near else f"tensor of shape {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value[:_LONG]]
    return str(value)[:_LONG]


def told(batches: list[Any]) -> str:
    """Say over which batches a run goes back, for a message; nothing if the loop did not tell.

    Example:
        >>> told([7, 8]), told([])
        (', over batches 7, 8', '')
    """
    if not batches:
        return ""
    shown = [str(batch)[:_SHOWN] for batch in batches]
    if len(shown) > _NAMED:
        shown[_NAMED - 1 : -1] = ["..."]
    return f", over batch{'es' if len(batches) > 1 else ''} {', '.join(shown)}"
