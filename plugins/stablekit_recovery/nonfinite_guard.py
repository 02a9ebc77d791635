"""Skipping steps whose gradients are not finite, with a limit on how many in a row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch

from stablekit import hookimpl
from stablekit.arguments import plugin_name, whole
from stablekit.errors import NonFiniteError
from stablekit.scalars import invert, is_finite, where

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step
    from stablekit.scalars import Scalar

__all__ = ["NonFiniteGuard"]


@final
class NonFiniteGuard:
    """Skip a step whose gradients hold NaN or Inf, or whose norm overflows float32.

    In a skipped step no parameter, no optimizer state and no statistic moves; the event "skip"
    names the tensors. After ``max_consecutive`` skips in a row the next bad step raises, since
    skipping on would only hide that the run is over. Overflows that a GradScaler finds are its own
    business and do not count.

    Args:
        max_consecutive: how many steps in a row may be skipped, at least 1.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``max_consecutive`` is not an integer.
        ValueError: It is below 1.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = stablekit.wrap(torch.optim.AdamW([p]), NonFiniteGuard())
        >>> p.grad = torch.tensor([1.0, float("nan")])
        >>> optimizer.step()
        >>> p.data, stablekit.session(optimizer).skipped
        (tensor([1., 1.]), 1)
    """

    cost = "one read of the gradients; with a fused optimizer no host read on accelerators"

    def __init__(self, *, max_consecutive: int = 20, name: str | None = None) -> None:
        """Check the limit."""
        self.max_consecutive = whole("max_consecutive", max_consecutive, at_least=1)
        self.name = plugin_name(name, "nonfinite-guard")
        self._in_a_row: Scalar = 0
        self._total: Scalar = 0

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Skip where the global norm is not finite."""
        norm, ok = step.scalar(step.gradients.raw_norm()), step.flag(step.ok)
        is_bad = invert(is_finite(norm)) & ok
        self._in_a_row = where(ok, (self._in_a_row + 1) * is_bad, self._in_a_row)
        self._total = self._total + is_bad
        step.record("skipped", self._total)
        if is_bad is False:
            return
        if not step.session.dry_run:
            step.defer(partial(self._check, step.number), torch.as_tensor(self._in_a_row))
        step.skip(
            "the gradients are not finite",
            when=is_bad,
            tensors=~step.gradients.raw_norms().isfinite(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were skipped, in a row and in all."""
        return {"in_a_row": int(self._in_a_row), "total": int(self._total)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting.

        Raises:
            TypeError: A count is not an integer.
            ValueError: A count is negative.
        """
        in_a_row, total = whole("in_a_row", state["in_a_row"]), whole("total", state["total"])
        self._in_a_row, self._total = in_a_row, total

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Count in a row as in a snapshot; how many steps were skipped in all is still true."""
        self.load_state_dict({**state, "total": int(self._total)})

    def _check(self, number: int, in_a_row: int) -> None:
        if in_a_row > self.max_consecutive:
            raise NonFiniteError(
                f"gradients are not finite for {int(in_a_row)} steps in a row, up to step {number};"
                f" {self.max_consecutive} may be skipped (max_consecutive). The"
                " parameters are as before the first of them: lower the learning rate, look at the"
                " tensors the events name, or resume from a checkpoint."
            )
