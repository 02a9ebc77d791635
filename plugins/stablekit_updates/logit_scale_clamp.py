"""Keeping the learned temperature of contrastive models in its range.

Radford et al.: Learning Transferable Visual Models From Natural Language Supervision
(arXiv 2103.00020), section 2.5: clipped "to prevent scaling the logits by more than 100".
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, final

import torch

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit.errors import AttachError
from stablekit_updates._weights import full, held, report

if TYPE_CHECKING:
    from stablekit import Step

__all__ = ["LogitScaleClamp"]


@final
class LogitScaleClamp:
    """Clamp parameters named ``logit_scale`` to ``[0, log(max_scale)]`` after every update.

    The parameter is the logarithm of the factor on the logits, as in CLIP, open_clip and the
    ``CLIPModel`` of transformers, which does not clamp it. Weight decay pulls it to a scale of 1;
    keep it out of the decayed group.

    Args:
        max_scale: the largest factor, above 1.
        parameter: pattern of the parameter's name, or of the last part of it.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``max_scale`` is not above 1.
        AttachError: No parameter has that name.

    Example:
        >>> import stablekit
        >>> scale = torch.nn.Parameter(torch.tensor(5.0))
        >>> optimizer = torch.optim.SGD([("logit_scale", scale)], lr=0.1)
        >>> session = stablekit.attach(optimizer, LogitScaleClamp())
        >>> scale.grad = torch.tensor(0.0)
        >>> optimizer.step()
        >>> scale.data
        tensor(4.6052)
    """

    cost = "nothing to speak of"
    needs = ("parameters",)

    def __init__(
        self,
        max_scale: float = 100.0,
        *,
        parameter: str = "logit_scale",
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.max_scale = number("max_scale", max_scale, above=1)
        if not isinstance(parameter, str) or not parameter:
            raise TypeError(f"parameter must be a name or a pattern, got {parameter!r}")
        self.parameter = parameter
        self.name = plugin_name(name, "logit-scale-clamp")

    @classmethod
    def example(cls) -> LogitScaleClamp:
        """Return an instance that takes any parameter for a temperature."""
        return cls(1.1, parameter="*")

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Clamp the logarithms of the scales."""
        top = torch.where(step.ok, math.log(self.max_scale), torch.inf)
        bottom = torch.where(step.ok, 0.0, -torch.inf)
        positions = self._positions(step)
        acted = {i: step.ok & False for i in positions}
        for i, scale in held(step, positions):
            acted[i] = ((scale < bottom) | (scale > top)).any()
            scale.clamp_(bottom.to(scale.device, scale.dtype), top.to(scale.device, scale.dtype))
        report(step, acted)
        scales = [full(step.parameters[i].detach()).float().exp().max() for i in positions]
        step.record("scale", torch.stack([scale.to(top.device) for scale in scales]).max())

    def _positions(self, step: Step) -> list[int]:
        names = step.gradients.names
        found = [
            i
            for i, name in enumerate(names)
            if fnmatchcase(name, self.parameter)
            or fnmatchcase(name.rpartition(".")[2], self.parameter)
        ]
        if not found:
            raise AttachError(
                f"{self.name} finds no parameter named {self.parameter} (names are like"
                f" {', '.join(names[:3])}); attach with model=..., or give parameter="
            )
        return found
