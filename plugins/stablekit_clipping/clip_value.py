"""Clipping every gradient element to a fixed range, as ``torch.nn.utils.clip_grad_value_`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["ClipValue"]


@final
class ClipValue:
    """Clamp every gradient element to ``[-limit, limit]``.

    Changes the direction of the gradient, unlike norm clipping. NaN elements stay NaN; infinite
    ones become ``limit``.

    Args:
        limit: the bound on absolute values, above 0.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``limit`` is not a number.
        ValueError: ``limit`` is not above 0.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([p], lr=1.0), ClipValue(0.5))
        >>> p.grad = torch.tensor([3.0, -0.25])
        >>> optimizer.step()
        >>> p.data
        tensor([-0.5000,  0.2500])
    """

    needs = ("amaxes", "elements")
    cost = "two reads of the gradients, and a write of the tensors that exceed the limit"

    def __init__(self, limit: float, *, name: str | None = None) -> None:
        """Check the limit."""
        self.limit = number("limit", limit, above=0)
        self.name = plugin_name(name, "clip-value")

    @classmethod
    def example(cls) -> ClipValue:
        """Return an instance that acts on gradients of ordinary size."""
        return cls(0.01)

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Clamp the tensors that exceed the limit; in device mode all of them."""
        gradients = step.gradients
        peaks = gradients.amaxes()
        step.record("threshold", self.limit)
        step.record("clipped", (peaks > self.limit).float().sum() / max(len(peaks), 1))
        # A tensor with a NaN has peak NaN, but its other elements are clamped as well.
        acting = set(gradients.names)
        if step.session.host:
            inside = (peaks <= self.limit).tolist()
            acting = {name for name, ok in zip(gradients.names, inside, strict=True) if not ok}
        if not acting:
            return
        edit = gradients.edit()
        edit.touched(acting)
        for name, gradient in edit:
            if name in acting:
                gradient.clamp_(-self.limit, self.limit)
