"""The latest norms of every tensor, to tell which of them stand out from their own past."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit.arguments import whole
from stablekit.statistics import NamedValues, history_of

if TYPE_CHECKING:
    from collections.abc import Mapping

WINDOW = 32
_ENOUGH = 8
_LEAST_SPREAD = 0.05
_GAUSSIAN = 1.4826


def own_scores(norms: Tensor, past: Tensor) -> Tensor:
    """Return by how many of its own standard deviations each tensor's norm stands out, ``[P]``.

    ``(log n - median) / (1.4826 * MAD)`` over the logarithms of its past; infinite for a norm that
    is not finite, 0 for a tensor with fewer than 8 past norms. Half of the past may be outliers.

    Args:
        norms: norms now, ``[P]``.
        past: past norms, ``[P, W]``, where 0 stands for none.

    Example:
        >>> own_scores(torch.tensor([1.0, 20.0]), torch.ones(2, 8))
        tensor([ 0.0, 40.4])
    """
    logs = torch.where(past > 0, past.log(), math.nan)
    middle = logs.nanmedian(1).values
    spread = (logs - middle.unsqueeze(1)).abs().nanmedian(1).values
    scores = (norms.log() - middle) / (_GAUSSIAN * spread.clamp(min=_LEAST_SPREAD))
    has_past = (past > 0).sum(1) >= _ENOUGH
    scores = torch.where(has_past & (norms > 0), scores, 0.0)
    return torch.where(norms.isfinite(), scores, math.inf)


@final
class NormHistory:
    """The norms of the last 32 steps that counted, by tensor name, on the host.

    A step costs nothing but a reference: norms are put in their places when someone asks, or 32
    steps at a time.
    """

    def __init__(self) -> None:
        """Start without a norm."""
        self._past = NamedValues(default=0.0, shape=(WINDOW,))
        self._steps = 0
        self._waiting: list[Tensor] = []
        self._names: tuple[str, ...] = ()

    def push(self, names: tuple[str, ...], norms: Tensor) -> None:
        """Take in finite norms, ``[P]``, in place of the oldest.

        They are kept as they are: nobody may write to them later.
        """
        if names is not self._names or len(self._waiting) == WINDOW:
            self._settle()
        self._names = names
        self._waiting.append(norms)

    def scores(self, names: tuple[str, ...], norms: Tensor) -> Tensor:
        """Return :func:`own_scores` of these norms."""
        self._settle()
        return own_scores(norms, self._past.align(names, norms.device))

    def worst(
        self, names: tuple[str, ...], norms: Tensor, *, top: int, least: float
    ) -> list[tuple[str, float]]:
        """Return names and scores of the tensors that stand out most, the worst first.

        Args:
            names: of all tensors.
            norms: now, ``[P]``.
            top: how many to return at most.
            least: the least score of a tensor that stands out.
        """
        scores = self.scores(names, norms)
        values, places = scores.topk(min(top, len(scores)))
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        return [(names[place], score) for place, score in pairs if score >= least]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, and the window of each tensor in the order of its places."""
        self._settle()
        rows = self._past.rows()
        return {"steps": self._steps, "norms": {name: rows[name].clone() for name in rows}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved windows.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A window has another length, or holds what is no norm.
        """
        steps = whole("steps", state["steps"])
        rows = {name: history_of(f"norms[{name!r}]", row) for name, row in state["norms"].items()}
        if odd := sorted(name for name, row in rows.items() if len(row) != WINDOW):
            raise ValueError(f"norms must be windows of {WINDOW}, not so {', '.join(odd)}")
        self._steps, self._waiting = steps, []
        self._past.replace({name: row.clone() for name, row in rows.items()})

    def _settle(self) -> None:
        """Put what waits in its places."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            places = [(self._steps + i) % WINDOW for i in range(len(waiting))]
            past = self._past.align(self._names, waiting[0].device)
            past[:, places] = torch.stack(waiting, 1)
            self._steps += len(waiting)
