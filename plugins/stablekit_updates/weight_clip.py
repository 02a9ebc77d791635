"""Clamping every weight to a fixed range, as the critic of a Wasserstein GAN needs it.

Arjovsky et al.: Wasserstein GAN (arXiv 1701.07875).
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit.errors import StablekitWarning
from stablekit_updates._weights import held, matrices, report

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["WeightClip", "clamp_weights_"]

_SAMPLE = 2**16


def clamp_weights_(weights: Tensor, limit: Tensor | float) -> Tensor:
    """Clamp weights to ``[-limit, limit]`` in place and return whether any was outside, 0-dim bool.

    Example:
        >>> w = torch.tensor([0.5, -2.0])
        >>> clamp_weights_(w, 1.0), w
        (tensor(True), tensor([ 0.5000, -1.0000]))
    """
    low, high = weights.aminmax()
    outside = torch.maximum(-low, high) > limit
    if isinstance(limit, Tensor):
        bound = limit.to(weights.device, weights.dtype)
        torch.clamp(weights, -bound, bound, out=weights)
    elif bool(outside):
        weights.clamp_(-limit, limit)
    return outside


@final
class WeightClip:
    """Clamp weights to ``[-limit, limit]`` after every update.

    The paper and Gulrajani et al.'s code clamp after the update, as here; the authors' code clamps
    before it, so that the generator sees a critic that is not clamped. Norms and biases are left
    alone unless they are named: ``only(WeightClip(), include="*")`` is the paper's, where every
    parameter of the critic is clamped.

    The default is that of the paper, for a critic that is trained under it from the start. It
    ruins a transformer: before weights are clamped for the first time there is a warning if in some
    tensor most of them are larger.

    Args:
        limit: the bound on absolute values, above 0.
        name: the plugin's name in the session.

    Raises:
        TypeError: ``limit`` is not a number.
        ValueError: ``limit`` is not above 0.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.ones(1, 2))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([w], lr=0.1), WeightClip(0.5))
        >>> w.grad = torch.tensor([[1.0, 9.0]])
        >>> optimizer.step()
        >>> w.data
        tensor([[0.5000, 0.1000]])
    """

    cost = "one read of the weights, and a write of the tensors with a weight outside"
    needs = ("parameters",)

    def __init__(self, limit: float = 0.01, *, name: str | None = None) -> None:
        """Check the limit."""
        self.limit = number("limit", limit, above=0)
        self.name = plugin_name(name, "weight-clip")
        self._has_looked = False

    @classmethod
    def example(cls) -> WeightClip:
        """Return one with a limit that suits usual weights."""
        return cls(1.0)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Clamp the weights."""
        limit: Tensor | float = self.limit
        if not step.session.host:
            limit = torch.where(step.ok, self.limit, torch.inf)
        positions = matrices(step)
        self._look(step, positions)
        acted = dict.fromkeys(positions, step.ok & False)
        acted |= {i: clamp_weights_(data, limit) for i, data in held(step, positions)}
        report(step, acted)

    def _look(self, step: Step, positions: list[int]) -> None:
        """Have the first weights that are to be clamped compared with the limit."""
        if self._has_looked:
            return
        self._has_looked = True
        usual = {step.gradients.names[i]: _usual_size(data) for i, data in held(step, positions)}
        if usual:
            home = step.gradients.device
            sizes = torch.stack([size.to(home) for size in usual.values()])
            step.defer(partial(self._compare, tuple(usual)), sizes)

    def _compare(self, names: tuple[str, ...], sizes: list[float]) -> None:
        above = {n: size for n, size in zip(names, sizes, strict=True) if size > self.limit}
        if above:
            worst = max(above, key=above.__getitem__)
            warnings.warn(
                f"{self.name} clamps to {self.limit:g}, but in {len(above)} of {len(names)} tensors"
                f" most weights are larger: the median |w| of {worst} is {above[worst]:.3g}. They"
                " are cut down to the limit, which ruins a model that was not made for it",
                StablekitWarning,
                stacklevel=2,
            )


def _usual_size(weights: Tensor) -> Tensor:
    """Return about the median of the absolute values, from at most 131072 of them."""
    some = weights.reshape(-1)[:: max(1, weights.numel() // _SAMPLE)]
    return some.abs().float().median()
