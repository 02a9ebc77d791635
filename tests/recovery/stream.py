"""One parameter, a chain, and steps with the losses and gradient norms a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

import stablekit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stablekit import Event

FUSED: dict[str, Any] = {"fused": True}


@final
class Stream:
    """Takes steps whose loss and gradient norm are given; the weight moves by the norm."""

    def __init__(
        self,
        *plugins: Any,  # noqa: ANN401 - any plugin form
        make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 1.0,
        fused: bool = False,
        **options: Any,  # noqa: ANN401 - options of attach
    ) -> None:
        """Attach."""
        self.param = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = make([("weight", self.param)], lr=lr, **(FUSED if fused else {}))
        self.session = stablekit.attach(self.optimizer, *plugins, **options)

    def step(self, norm: float = 1.0, loss: float | None = None, batch: object = None) -> bool:
        """Take a step and tell whether the weight moved."""
        before = self.param.detach().clone()
        self.param.grad = torch.tensor([norm, 0.0])
        if loss is not None or batch is not None:
            self.session.observe(loss=loss, batch=batch)
        self.optimizer.step()
        return not torch.equal(before, self.param.detach())

    def go(self, norms: Iterable[float]) -> list[bool]:
        """Take steps with these norms and tell which moved the weight."""
        return [self.step(norm) for norm in norms]

    def losses(self, losses: Iterable[float]) -> list[bool]:
        """Take steps with these losses and tell which moved the weight."""
        return [self.step(1.0, loss) for loss in losses]

    def events(self, *kinds: str) -> list[Event]:
        """Return the events of these kinds; all, without any."""
        self.session.metrics()
        return [e for e in self.session.events if not kinds or e.kind in kinds]

    def kinds(self) -> list[str]:
        """Return the kinds of the events that plugins emitted."""
        return [event.kind for event in self.events() if event.plugin]

    @property
    def weight(self) -> float:
        """The element that moves."""
        return self.param[0].item()
