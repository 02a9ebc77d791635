"""What is measured on: GPT-2's parameter tensors with gradients, and optimizers of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = 12
CONTEXT = 1024
NORM = 0.1


@final
@dataclass(frozen=True)
class Workload:
    """A GPT-2 of some width and vocabulary, 12 blocks deep."""

    name: str
    width: int
    vocabulary: int


GPT2 = Workload("gpt2", 768, 50257)
TINY = Workload("tiny", 64, 1000)
WORKLOADS = {workload.name: workload for workload in (GPT2, TINY)}


def shapes(workload: Workload) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters in their order, output head tied to ``wte``.

    148 tensors, as ``GPT2LMHeadModel.parameters()`` gives them: two embeddings, twelve of each
    block, two of the last norm.
    """
    width = workload.width
    block: list[tuple[int, ...]] = [
        *((width,), (width,)),  # ln_1
        *((width, 3 * width), (3 * width,)),  # attn.c_attn; Conv1D keeps weights transposed
        *((width, width), (width,)),  # attn.c_proj
        *((width,), (width,)),  # ln_2
        *((width, 4 * width), (4 * width,)),  # mlp.c_fc
        *((4 * width, width), (width,)),  # mlp.c_proj
    ]
    return [(workload.vocabulary, width), (CONTEXT, width), *block * BLOCKS, (width,), (width,)]


@final
class Tensors:
    """The parameters of a workload, each with a gradient; the global gradient norm is ``NORM``."""

    def __init__(self, workload: Workload, *, keep_source: bool = False) -> None:
        """Draw weights and gradients.

        Args:
            workload: whose shapes.
            keep_source: keep a copy of the gradients, for :meth:`restore`.
        """
        generator = torch.Generator().manual_seed(0)
        self.workload = workload
        self.params = [
            Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes(workload)
        ]
        scale = NORM / sum(param.numel() for param in self.params) ** 0.5
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator) * scale
        self._source = [grad.clone() for grad in self.grads] if keep_source else []
        self._generator = generator

    @property
    def grads(self) -> list[Tensor]:
        """The gradients."""
        return [param.grad for param in self.params if param.grad is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was done to the gradients."""
        torch._foreach_copy_(self.grads, self._source)

    @torch.no_grad()
    def vary(self, spread: float = 0.05) -> None:
        """Give every gradient its original value times a random factor of its own."""
        factors = torch.randn(len(self.params), generator=self._generator).mul(spread).exp()
        self.restore()
        torch._foreach_mul_(self.grads, list(factors.unbind()))


@final
class Free(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that only what is attached to it costs time."""

    def __init__(self, params: list[Parameter]) -> None:
        """Hold the parameters."""
        super().__init__(params, {"lr": 1e-4})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # torch's is overloaded
        """Do nothing."""


def free(tensors: Tensors) -> Free:
    """Return an optimizer that does nothing."""
    return Free(tensors.params)


@final
class FusedAdamW:
    """Makes fused AdamW optimizers that share parameters and moments.

    So a bare step and a step with a plugin touch the same memory. Make and attach all of them
    before the first step.
    """

    def __init__(self, tensors: Tensors) -> None:
        """Start without moments."""
        self._params = tensors.params
        self._state: Any = None

    def __call__(self) -> torch.optim.AdamW:
        """Return one more optimizer."""
        optimizer = torch.optim.AdamW(self._params, lr=1e-6, fused=True)
        if self._state is None:
            self._state = optimizer.state
        optimizer.state = self._state
        return optimizer
