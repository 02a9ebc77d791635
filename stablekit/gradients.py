"""The gradients of one step as plugins see them: norms read once, scaling written once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final, overload

import torch
from torch import Tensor

from stablekit._commit import commit
from stablekit._sharding import local
from stablekit.errors import HookError
from stablekit.scalars import ratio, where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stablekit._ledger import Ledger
    from stablekit.scalars import Scalar

__all__ = ["Edit", "Gradients", "clip_factor", "local"]


@overload
def clip_factor(norm: Tensor, max_norm: Tensor | float, *, eps: float = ...) -> Tensor: ...
@overload
def clip_factor(norm: float, max_norm: float, *, eps: float = ...) -> float: ...
@overload
def clip_factor(norm: Scalar, max_norm: Scalar, *, eps: float = ...) -> Scalar: ...
def clip_factor(norm: Scalar, max_norm: Scalar, *, eps: float = 1e-6) -> Scalar:
    """Return the factor that brings a norm down to a threshold.

    ``min(1, max_norm / (norm + eps))``; 0 for an infinite norm, NaN for a NaN norm (which
    :meth:`Gradients.scale_` takes as 1).

    Args:
        norm: gradient norms: a float, or a tensor of any shape.
        max_norm: thresholds, a number or a tensor that broadcasts with ``norm``; may be infinite.
        eps: guards the division, as in ``torch.nn.utils.clip_grad_norm_``.

    Example:
        >>> clip_factor(torch.tensor([0.5, 4.0, float("inf")]), 1.0)
        tensor([1.0000, 0.2500, 0.0000])
        >>> clip_factor(2.0, 1.0, eps=0.0)
        0.5
    """
    if isinstance(norm, Tensor):
        return torch.where(norm.isposinf(), 0.0, (max_norm / (norm + eps)).clamp(max=1.0))
    if norm == math.inf:
        return 0.0
    factor = ratio(max_norm, norm + eps)
    return where(factor > 1.0, 1.0, factor)


@final
class Gradients:
    """The gradients of all parameters, or of those a plugin was restricted to with ``only``.

    ``P`` is the number of parameters, in the order of the optimizer's groups. A parameter without
    gradient has norm 0 and is off in :attr:`present`. Norms are L2, float32, global over all
    shards, and the same bits on every rank that holds the tensor. ``raw_*`` are as backward left
    them; the others include every factor applied so far, without reading memory again.

    Example:
        >>> import stablekit
        >>> class Halve:
        ...     name = "halve"
        ...
        ...     @stablekit.hookimpl
        ...     def transform_gradients(self, step):
        ...         step.gradients.scale_(torch.tensor(0.5))
    """

    __slots__ = ("_chosen", "_ledger", "_where", "_writable")

    def __init__(
        self, ledger: Ledger, chosen: tuple[int, ...] | None = None, *, writable: bool = False
    ) -> None:
        """Look at the books of one step through a choice of positions; None is all of them."""
        self._ledger = ledger
        self._chosen = chosen
        self._where = None if chosen is None else ledger.layout.subset(chosen)
        self._writable = writable

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical parameter names, ``P`` of them; the same tuple object while nothing changes."""
        names = self._ledger.layout.names
        return names if self._chosen is None else self._ledger.layout.names_at(self._chosen)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, ``P`` of them; DTensors where they are sharded."""
        return [self._ledger.memory.params[i] for i in self._indices()]

    @property
    def present(self) -> Tensor:
        """Which parameters have a gradient, on any rank that shares them, bool ``[P]``."""
        return self._pick(self._ledger.memory.present)

    @property
    def device(self) -> torch.device:
        """The device on which norms and factors live."""
        return self._ledger.layout.device

    def raw_norms(self) -> Tensor:
        """Return per-tensor norms as backward left them, float32 ``[P]``."""
        return self._pick(self._ledger.raw_norms())

    def raw_norm(self) -> Tensor:
        """Return the global norm as backward left it, 0-dim float32."""
        if self._chosen is None:
            return self._ledger.raw_norm()
        return self._ledger.total(self.raw_norms(), self._chosen)

    def norms(self) -> Tensor:
        """Return per-tensor norms now, float32 ``[P]``."""
        return self._pick(self._ledger.norms())

    def norm(self) -> Tensor:
        """Return the global norm now, 0-dim float32."""
        if self._chosen is None:
            return self._ledger.norm()
        return self._ledger.total(self.norms(), self._chosen)

    def amaxes(self) -> Tensor:
        """Return the largest absolute element of each tensor now, float32 ``[P]``.

        One more read of the gradients, and one more reduction where they are sharded.
        """
        return self._pick(self._ledger.amaxes())

    def unit_norms(self) -> list[Tensor]:
        """Return the norm of every output unit now: ``P`` float32 vectors.

        A unit is a row of dim 0; a tensor of fewer than two dims is one unit. A sparse gradient
        gives those rows it holds; no gradient gives zeros; a sharded tensor gives the units of the
        whole tensor on every rank. A plugin that announces ``needs = ("unit_norms",)`` has them
        read, and reduced, together with the norms.
        """
        return self._ledger.unit_norms(self._indices())

    def weight_unit_norms(self) -> list[Tensor]:
        """Return the norms of the parameters' own units, aligned with :meth:`unit_norms`.

        Zeros where there is no gradient. ``needs = ("weight_unit_norms",)`` lets those of sharded
        parameters ride in the reduction of the norms.
        """
        return self._ledger.weight_unit_norms(self._indices())

    def scale_(self, factor: Scalar) -> None:
        """Multiply the gradients by a factor, 0-dim for all or ``[P]`` for each tensor.

        Nothing is written now: factors of all plugins are multiplied and written together. A NaN
        factor counts as 1; factor 0 makes the derived norms 0.

        Raises:
            HookError: Called outside ``transform_gradients``.
            ValueError: The shape is neither ``()`` nor ``[P]``.
        """
        self._allow("scale_")
        if not isinstance(factor, Tensor):
            if factor == 1:
                return
            factor = torch.tensor(factor, dtype=torch.float32, device=self.device)
        factor = factor.detach().to(self.device, torch.float32)
        count = len(self._indices())
        if factor.shape not in ((), (count,)):
            raise ValueError(f"factor must be 0-dim or [{count}], got {list(factor.shape)}")
        if self._where is not None:
            ones = torch.ones(len(self._ledger.layout.names), device=self.device)
            factor = ones.index_copy(0, self._where, factor.expand(count))
        self._ledger.scale(factor)

    def scale_units_(self, factors: Sequence[Tensor]) -> None:
        """Multiply output units by factors shaped like :meth:`unit_norms`; written later, as above.

        Raises:
            HookError: Called outside ``transform_gradients``.
            ValueError: The factors are not shaped like the units.
        """
        self._allow("scale_units_")
        chosen = self._indices()
        counts = [self._ledger.memory.unit_count(i) for i in chosen]
        if [tuple(factor.shape) for factor in factors] != [(count,) for count in counts]:
            shapes = [list(factor.shape) for factor in factors]
            raise ValueError(f"factors must be vectors of lengths {counts}, got {shapes}")
        self._ledger.scale_units(dict(zip(chosen, factors, strict=True)))

    def edit(self) -> Edit:
        """Return (name, local gradient) pairs to be changed in place, element by element.

        What is pending is written first. Norms of the tensors that the editor reports with
        :meth:`Edit.touched` (of all of them, if it reports nothing) are read again when asked for.
        Every rank must call this, and report the same names, whatever part it holds.

        Raises:
            HookError: Called outside ``transform_gradients``.
        """
        self._allow("edit")
        if self._ledger.dry_run:
            self._ledger.leave_memory()
        commit(self._ledger)
        return Edit(self._ledger, self._indices())

    def _indices(self) -> Sequence[int]:
        return self._ledger.layout.everywhere if self._chosen is None else self._chosen

    def _pick(self, values: Tensor) -> Tensor:
        return values if self._where is None else values[self._where]

    def _allow(self, what: str) -> None:
        if not self._writable:
            raise HookError(f"gradients.{what} is legal in transform_gradients only")


@final
class Edit:
    """The gradients of one element-wise edit: iterate over (name, local gradient) pairs."""

    __slots__ = ("_before", "_indices", "_ledger")

    def __init__(self, ledger: Ledger, indices: Sequence[int]) -> None:
        """Open the tensors at these positions; until told otherwise all count as changed."""
        self._ledger = ledger
        self._indices = indices
        self._before = ledger.bookmark()
        ledger.was_edited(indices)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the local gradient of every tensor that has one."""
        for i in self._indices:
            data = self._ledger.memory.data[i]
            if data is not None:
                yield self._ledger.layout.names[i], data

    def touched(self, names: Iterable[str]) -> None:
        """Report which tensors were changed, so that the others keep the norms already read.

        Raises:
            ValueError: A name is not one of those that can be edited.
        """
        changed = set(names)
        places = {self._ledger.layout.names[i]: i for i in self._indices}
        if unknown := sorted(changed - places.keys()):
            raise ValueError(f"touched() takes names of tensors in this edit, got {unknown}")
        self._ledger.go_back(self._before)
        self._ledger.was_edited(places[name] for name in changed)
