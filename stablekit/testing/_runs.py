"""A small training run with known faults, for checks that compare one run with another."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit import attach, create, hookimpl
from stablekit.catalogue import available
from stablekit.hookspecs import Plugin

if TYPE_CHECKING:
    from stablekit import Session, Step

Factory = Callable[[], Plugin]
"""Anything that returns a new plugin when called: a class, a lambda, :func:`factory_of`."""


def factory_of(name: str) -> Factory:
    """Return what makes a plugin of the catalogue: its ``example()``, or its defaults.

    Raises:
        UnknownPluginError: No distribution provides the name.
    """
    if name in available():
        entry = available()[name].entry_point
        module, _, attribute = entry.partition(":")
        cls = getattr(__import__(module, fromlist=[attribute]), attribute)
        example: Factory | None = getattr(cls, "example", None)
        if example is not None:
            return example
    return lambda: create(name)


@final
class NanGuard:
    """Skip steps with non-finite gradients; the least a check needs, without any plugin package."""

    name = "nan-guard"

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Skip where the norm is not finite."""
        norm = step.gradients.raw_norm()
        step.skip("the gradients are not finite", when=~norm.isfinite())


@final
class Network(nn.Sequential):
    """Two linear layers and, beside them, the module that judges what they put out."""

    def __init__(self) -> None:
        """Make the module "loss" and the layers "0" to "2", the last of which makes the output."""
        layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        named = {str(place): layer for place, layer in enumerate(layers)}
        super().__init__(OrderedDict(loss=nn.CrossEntropyLoss(), **named))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of three classes."""
        for name, layer in self.named_children():
            x = x if name == "loss" else layer(x)
        return x

    def judge(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy."""
        judged: Tensor = self.get_submodule("loss")(logits, labels)
        return judged


@final
class TinyRun:
    """A two-layer network on random data, one seed, with faults at the steps that name them.

    Args:
        plugins: what to attach, in order.
        optimizer: makes the optimizer from parameters.
        nan_at: steps (from 0) in which one gradient element is NaN.
        inf_at: steps in which one gradient element is infinite.
        spike_at: steps in which all gradients are multiplied by 1000.
        none_at: steps in which the first bias has no gradient.
        dtype: of parameters and data.
        **options: for ``attach``.
    """

    def __init__(
        self,
        *plugins: Any,  # noqa: ANN401 - any plugin form
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        nan_at: tuple[int, ...] = (),
        inf_at: tuple[int, ...] = (),
        spike_at: tuple[int, ...] = (),
        none_at: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **options: Any,  # noqa: ANN401 - options of attach
    ) -> None:
        """Build the model and attach the plugins, if there are any."""
        generator = torch.Generator().manual_seed(0)
        self.model = Network()
        for param in self.model.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.5
        self.model.to(device=device, dtype=dtype)
        self.data = torch.randn(64, 4, 6, generator=generator).to(device=device, dtype=dtype)
        self.labels = torch.arange(4, device=device) % 3
        make = optimizer or (lambda params: torch.optim.AdamW(params, lr=0.01))
        self.optimizer = make(self.model.parameters())
        self.faults = {"nan": nan_at, "inf": inf_at, "spike": spike_at, "none": none_at}
        self.step = 0
        self.session: Session | None = None
        if plugins:
            self.session = attach(self.optimizer, *plugins, model=self.model, **options)

    def go(self, steps: int) -> TinyRun:
        """Train for so many steps and return the run."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self._break()
            self.optimizer.step()
            self.step += 1
        return self

    def loss(self) -> Tensor:
        """Return the loss of the current step's batch."""
        output: Tensor = self.model(self.data[self.step % 64])
        return output.square().mean() + self.model.judge(output, self.labels)

    def weights(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [param.detach().clone() for param in self.model.parameters()]

    def state(self) -> dict[str, Any]:
        """Return a deep copy of the optimizer's state without stablekit's part."""
        state = copy.deepcopy(self.optimizer.state_dict())
        state.pop("stablekit", None)
        return state

    def plugin_state(self) -> dict[str, Any]:
        """Return the state of the attached plugins."""
        assert self.session is not None
        plugins: dict[str, Any] = self.session.state_dict()["plugins"]
        return plugins

    def _break(self) -> None:
        first, bias = list(self.model.parameters())[:2]
        if first.grad is None:
            return
        if self.step in self.faults["nan"]:
            first.grad.view(-1)[0] = float("nan")
        if self.step in self.faults["inf"]:
            first.grad.view(-1)[0] = float("inf")
        if self.step in self.faults["spike"]:
            for param in self.model.parameters():
                assert param.grad is not None
                param.grad *= 1000
        if self.step in self.faults["none"]:
            bias.grad = None
