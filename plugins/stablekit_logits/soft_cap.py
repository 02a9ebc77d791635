"""Keeping logits below a bound with a tangent that leaves small ones nearly as they are.

Bello et al.: Neural Combinatorial Optimization (arXiv 1611.09940), section 5; as the last layer of
Gemma 2 (arXiv 2408.00118), cap 30, whose modelling code in transformers is the reference. It
computes in the dtype of the logits, here in float32: in bfloat16 large logits are ties there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit_logits._door import OutputDoor
from stablekit_logits._heads import module_name

if TYPE_CHECKING:
    from stablekit import Session, Step

__all__ = ["SoftCap", "SoftCapping", "soft_cap"]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return ``cap * tanh(logits / cap)``, computed in float32 and returned in the same dtype.

    At most ``cap`` in magnitude, in the same order, and ``z - z ** 3 / (3 cap ** 2)`` near 0. The
    gradient is ``1 - tanh(z / cap) ** 2``, which vanishes far above the cap. As logits are between
    ``-cap`` and ``cap``, cross entropy over V classes is at least ``log(1 + (V - 1) exp(-2 cap))``.

    Example:
        >>> soft_cap(torch.tensor([0.1, 5.0, 500.0]), 5.0)
        tensor([0.1000, 3.8080, 5.0000])
    """
    inner = logits if logits.dtype == torch.float64 else logits.float()
    return (cap * torch.tanh(inner / cap)).to(logits.dtype)


@final
class SoftCapping(nn.Module):
    """A layer that returns :func:`soft_cap` of its input.

    Args:
        cap: above 0.

    Raises:
        TypeError: The cap is not a number.
        ValueError: It is not finite or not above 0.

    Example:
        >>> nn.Sequential(nn.Linear(2, 4), SoftCapping(5.0))(torch.full((2,), 1e6)).abs().max()
        tensor(5., grad_fn=<MaxBackward1>)
    """

    def __init__(self, cap: float = 30.0) -> None:
        """Check the argument."""
        super().__init__()
        self.cap = number("cap", cap, above=0)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the capped logits."""
        return soft_cap(logits, self.cap)

    def extra_repr(self) -> str:
        """Show the cap."""
        return f"{self.cap:g}"


@final
class SoftCap:
    """Replace the logits by ``cap * tanh(logits / cap)``, in training, evaluation and generation.

    The model becomes another one: it stays capped as long as the session is attached, and so do
    copies made of it meanwhile. A checkpoint does not say so: whoever loads it has to attach the
    plugin, or put :class:`SoftCapping` behind the head, to compute the same. It does not fold into
    weights. Exports to engines whose architecture has no such cap lose it.

    Metric: ``saturated``, the share of logits above the cap in magnitude before they were capped,
    whose gradient is less than 0.42 of what it was.

    Args:
        cap: above 0. Gemma 2 takes 30; 15 to 30 is usual for language models.
        on: name of the module whose output are the logits ("head"), "" for the model itself; None
            is the output embedding of a model of transformers.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
        AttachError: There is no model or no such module, the model caps its logits itself, or its
            forward is Liger's, which caps with an argument of its own.

    Example:
        >>> import stablekit
        >>> model = nn.Linear(1, 2, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with stablekit.attach(optimizer, SoftCap(5.0, on=""), model=model):
        ...     model(torch.full((1, 1), 1e6)).abs().detach()
        tensor([[5., 5.]])
    """

    needs = ("model", "loss")
    cost = "in every forward pass a tanh of the logits, and a comparison; one reduction over ranks"

    def __init__(
        self, cap: float = 30.0, *, on: str | int | None = None, name: str | None = None
    ) -> None:
        """Check the arguments."""
        self.cap = number("cap", cap, above=0)
        self.on = module_name(on)
        self.name = plugin_name(name, "soft-cap")
        self._door = OutputDoor(
            self.name,
            "saturated",
            on=self.on,
            through=self._through,
            stays=partial(soft_cap, cap=self.cap),
        )

    @classmethod
    def example(cls) -> SoftCap:
        """Return one for any model that returns a tensor."""
        return cls(on="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Listen to the module."""
        _refuse_capped(modules.model_of(session, self.name), self.name)
        self._door.open(session)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Refuse to train on logits that are not capped."""
        self._door.check(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what the forward passes showed."""
        self._door.tally.record(step)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Let the model go."""
        self._door.close(session)

    def _through(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            count = torch.full((), logits.numel(), device=logits.device)
            self._door.tally.add(count, (logits.abs() > self.cap).sum())
        return soft_cap(logits, self.cap)


def _refuse_capped(model: nn.Module, plugin: str) -> None:
    for module in model.modules():
        cap = getattr(getattr(module, "config", None), "final_logit_softcapping", None)
        if cap is not None:
            raise AttachError(
                f"{plugin}: {type(module).__name__} caps its logits at {cap} itself; set"
                " config.final_logit_softcapping to another value, or to None for this plugin"
            )
