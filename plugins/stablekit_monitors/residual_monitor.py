"""How large the residual stream is behind every block of a model.

In pre-norm transformers it grows with depth, and in training: Kim et al.: Peri-LN: Revisiting
Normalization Layer in the Transformer Architecture (arXiv 2502.02732).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit import hookimpl
from stablekit.arguments import flag, plugin_name, whole
from stablekit.errors import AttachError
from stablekit.forward import Sampling, Slots, largest, modules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step

__all__ = ["ResidualMonitor", "mean_square"]

_LISTS = ("layers", "layer", "blocks", "block", "h")


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of the squares of a tensor's elements, 0-dim float32.

    Without a float32 copy of the tensor, and without overflow in half types.

    Args:
        x: of any shape and floating point type.

    Example:
        >>> mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor(6.2500)
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    rows: Tensor = torch.linalg.vector_norm(torch.atleast_1d(x), dim=-1, dtype=kind)
    return (rows.square().sum() / x.numel()).float()


@final
class ResidualMonitor:
    """Record the RMS of the residual stream behind every block, in one step of so many.

    ``RMS = sqrt(mean(x ** 2))`` over all elements of a block's output in all micro-batches of the
    step (the first tensor where it returns several), over all ranks; padding counts. Forward passes
    in evaluation mode or without gradients are not looked at. A step that is not sampled costs one
    look at a flag for each block.

    Metrics: ``<name of the block>``, and ``largest`` of them, without unit. In a fresh pre-norm
    model they grow as the square root of depth; healthy is what stays within a few times that. One
    that doubles within some hundred steps, or is many times its neighbours, is a warning. NaN: no
    training batch went through the block.

    Event "unseen": nothing went through any block in the first sampled step.

    Args:
        every: sample the steps whose number this divides, at least 1.
        blocks: names of the blocks, in which ``*`` stands for one part ("encoder.blocks.*"). None
            takes the members of the outermost ``ModuleList`` or ``Sequential`` called layers,
            layer, blocks, block or h: ``model.layers`` of LLaMA and Qwen, ``transformer.h`` of
            GPT-2.
        reduce: agree with all ranks, which costs one reduction in a sampled step. Must be False
            where ranks hold different blocks (pipeline parallelism).
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> monitor = ResidualMonitor(every=1, blocks="*")
        >>> session = stablekit.attach(optimizer, monitor, model=model)
        >>> y = model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(name for name in session.metrics() if name.startswith("residual"))
        ['residual-monitor/0', 'residual-monitor/1', 'residual-monitor/largest']
    """

    needs = ("model",)
    cost = (
        "in sampled steps one read of every block's output and one reduction over ranks; otherwise"
        " one flag for each block"
    )

    def __init__(
        self,
        every: int = 100,
        *,
        blocks: str | None = None,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.blocks = modules.pattern("blocks", blocks)
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "residual-monitor")
        self._sampling = Sampling(self.every)
        self._names: tuple[str, ...] = ()
        self._slots: Slots | None = None

    @classmethod
    def example(cls) -> ResidualMonitor:
        """Return one that finds something to look at in any model."""
        return cls(every=1, blocks="*")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Find the blocks and listen to them."""
        model = modules.model_of(session, self.name)
        found = blocks_of(model) if self.blocks is None else self._chosen(model)
        device = modules.device_of(model)
        self._names = tuple(found)
        self._slots = Slots(self._sampling, len(found), sums=2, device=device)
        for slot, block in enumerate(found.values()):
            self._slots.watch(slot, block, _look)
        self._sampling.attach(session)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what a sampled step saw."""
        if self._sampling.is_armed and self._slots is not None:
            total, passes = self._slots.take(reduce=self.reduce).unbind(1)
            rms = (total / passes).sqrt()
            for name, value in zip(self._names, rms.unbind(), strict=True):
                step.record(name, value)
            step.record("largest", largest(rms, passes > 0))
            self._sampling.complain(step, passes, "no block saw a training batch")
        self._sampling.arm(step.number)

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._sampling.detach()
        self._slots = None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is sampled."""
        return self._sampling.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: A field is not a bool.
        """
        self._sampling.load_state_dict(state)

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        assert self.blocks is not None
        return modules.matching(model, self.blocks, argument="blocks")


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by name: the members of its outermost lists of blocks.

    Raises:
        AttachError: No list is called what lists of blocks usually are.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> list(blocks_of(model))
        ['layers.0', 'layers.1']
    """
    kinds = (nn.ModuleList, nn.Sequential)
    by_name = modules.named(model)
    lists = {name: m for name, m in by_name.items() if isinstance(m, kinds) and len(m)}
    blocks = [name for name in lists if name.rpartition(".")[2] in _LISTS]
    outer = [n for n in blocks if not any(n.startswith(f"{other}.") for other in blocks)]
    if not outer:
        raise AttachError(
            f"no list of blocks was found in {type(model).__name__}: none is called"
            f" {', '.join(_LISTS)}. Name the blocks, as in blocks='encoder.stages.*'; there are the"
            f" lists {', '.join(name for name in lists if name) or '(none)'}"
        )
    return {name: module for name, module in by_name.items() if name.rpartition(".")[0] in outer}


def _look(output: Any) -> Tensor | None:  # noqa: ANN401 - any module's output
    tensors = modules.tensors_in(output)
    if not tensors or not tensors[0].numel():
        return None
    found = mean_square(modules.whole(tensors[0]))
    return torch.stack([found, torch.ones_like(found)])
