"""The parameters of a session in their fixed order, with names and places, as of this step."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit._engines import SUPPORTED
from stablekit._norms import Shapes
from stablekit._sharding import PLACES, Span, are_dtensors, is_dtensor, rows_here, spans_of
from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn
    from torch.optim import Optimizer

_CACHED = 64
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical(name: str) -> str:
    """Return a parameter name without what DDP, FSDP, compile and checkpointing put in front.

    Example:
        >>> canonical("module._orig_mod.layers.0.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@final
class Layout:
    """What stays the same from step to step while the parameters stay the same objects."""

    def __init__(self, params: list[Tensor], names: tuple[str, ...], groups: list[int]) -> None:
        """Find out which parameters are cut over which ranks."""
        self.names = names
        self.groups = groups
        self.device = params[0].device if params else torch.device("cpu")
        self.everywhere = tuple(range(len(params)))
        self.everyone = torch.ones(len(params), dtype=torch.bool, device=self.device)
        self.true = torch.ones((), dtype=torch.bool, device=self.device)
        self.quiet = torch.zeros(4, device=self.device)
        self.on_mesh = frozenset(i for i, param in enumerate(params) if is_dtensor(param))
        self.kinds = set(map(type, params))
        self.places = list(map(PLACES, params)) if are_dtensors(params) else []
        self.spans = spans_of(params)
        self._subsets: dict[tuple[int, ...], Tensor] = {}
        self._names: dict[tuple[int, ...], tuple[str, ...]] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {self.everywhere: self.everyone}
        self._rows: dict[int, Tensor | None] = {}
        self._shapes: Shapes | None = None

    def shapes_of(self, parts: list[Tensor]) -> Shapes:
        """Return the shapes of this rank's parts of all gradients, found once."""
        if self._shapes is None:
            self._shapes = Shapes(parts)
        return self._shapes

    @cached_property
    def ones(self) -> Tensor:
        """What every tensor with a gradient adds to the count of them; asked for if any is cut."""
        return self.everyone.float()

    @property
    def world_span(self) -> Span | None:
        """The span that is all ranks there are, so that a mean over it is the global mean."""
        return next((span for span in self.spans if span.is_world), None)

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks that hold parts of the same tensors as this one, empty where none does."""
        return frozenset[int]().union(*(span.ranks for span in self.spans))

    def rows(self, i: int, param: Tensor) -> Tensor | None:
        """Return which rows of parameter i this rank holds, None for all of them; found once."""
        if i not in self._rows:
            rows = rows_here(param)
            self._rows[i] = rows if rows is None else rows.to(self.device)
        return self._rows[i]

    def subset(self, index: tuple[int, ...]) -> Tensor:
        """Return positions as an index tensor on the device, made once."""
        if index not in self._subsets:
            if len(self._subsets) >= _CACHED:
                self._subsets.clear()
            self._subsets[index] = torch.tensor(index, dtype=torch.long, device=self.device)
        return self._subsets[index]

    def others(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Return all positions but these."""
        if not index:
            return self.everywhere
        left_out = set(index)
        return tuple(i for i in self.everywhere if i not in left_out)

    def names_at(self, index: tuple[int, ...]) -> tuple[str, ...]:
        """Return the names at these positions, the same object every time."""
        if index not in self._names:
            self._names[index] = tuple(self.names[i] for i in index)
        return self._names[index]

    def mask(self, index: tuple[int, ...]) -> Tensor:
        """Return a bool ``[P]`` that is true at these positions, made once."""
        if index not in self._masks:
            if len(self._masks) >= _CACHED:
                self._masks.clear()
            mask = torch.zeros(len(self.names), dtype=torch.bool, device=self.device)
            self._masks[index] = mask.index_fill(0, self.subset(index), True)
        return self._masks[index]


def parameters_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return all parameters of all groups, in order."""
    return [
        param
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def layout_of(optimizers: Sequence[Optimizer], model: nn.Module | None) -> Layout:
    """Resolve names and places of the parameters the optimizers hold now.

    Raises:
        AttachError: They are flat shards of FSDP1.
    """
    _refuse_flat(parameters_of(optimizers))
    known = _named(model) if model is not None else {}
    params, names, groups = [], [], []
    number = -1
    for which, optimizer in enumerate(optimizers):
        prefix = f"optimizer{which}." if len(optimizers) > 1 else ""
        for g, group in enumerate(optimizer.param_groups):
            number += 1
            given = group.get("param_names")
            for i, param in enumerate(group["params"]):
                shape = "x".join(map(str, param.shape))
                named = given[i] if given else f"{prefix}group{g}.{i}({shape})"
                params.append(param)
                names.append(known.get(id(param)) or canonical(named))
                groups.append(number)
    return Layout(params, tuple(_unique(names)), groups)


def _refuse_flat(params: Sequence[Tensor]) -> None:
    """Refuse parameters of FullyShardedDataParallel: plain tensors that hold parts of others."""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise AttachError(
            "the parameters are flat shards of FullyShardedDataParallel (FSDP1), with or without"
            " use_orig_params: nothing tells which part of which tensor they hold, so norms would"
            f" be those of the shards. {SUPPORTED} (fsdp_version=2 in Accelerate and Trainer)"
        )


def _named(model: nn.Module) -> dict[int, str]:
    return {id(param): canonical(name) for name, param in model.named_parameters()}


def _unique(names: Iterable[str]) -> list[str]:
    result: dict[str, None] = {}
    for name in names:
        given, number = name, 1
        while name in result:
            number += 1
            name = f"{given}#{number}"
        result[name] = None
    return list(result)
