"""The books of one step's gradients: what was read, and what is still to be multiplied."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import _norms
from stablekit._sharding import all_reduce, gather_norms, is_cut_inside_units, local, shard_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed import ProcessGroup

    from stablekit._layout import Layout

_LAYOUT = attrgetter("layout")


@final
class Ledger:
    """Norms are read from memory once; factors wait here until they are written once.

    *In memory* are the local gradients, ``data``. Pending are ``unit_factors`` (position -> one
    factor an output unit) and ``factor`` (None for one, 0-dim for all tensors, or ``[P]``).
    ``_base`` and ``_units`` are norms of memory times unit factors, ``_peaks`` likewise.
    """

    def __init__(
        self,
        params: list[Tensor],
        layout: Layout,
        *,
        host: bool,
        dry_run: bool = False,
        unscale: Tensor | None = None,
        reduce_groups: Sequence[ProcessGroup] = (),
        ride: Tensor | None = None,
    ) -> None:
        """Open the books on the gradients as backward left them.

        Args:
            params: the parameters, in layout order.
            layout: their names and places.
            host: whether values may be read on the host.
            dry_run: whether edits must not reach the gradients.
            unscale: what gradients in memory must be multiplied by to be true (1 / loss scale).
            reduce_groups: further process groups over which squared norms add up.
            ride: float32 vector to be summed in the reduction of the norms.
        """
        self.params = params
        self.layout = layout
        self.host = host
        self.dry_run = dry_run
        self.unscale = unscale
        self.reduce_groups = reduce_groups
        self.ride = ride if ride is not None else torch.empty(0, device=layout.device)
        self.data = local_gradients(params)
        self.held, self.present = layout.everywhere, layout.everyone
        if any(data is None for data in self.data):
            self.held = tuple(i for i, data in enumerate(self.data) if data is not None)
            self.present = layout.mask(self.held)
        self.factor: Tensor | None = None
        self.unit_factors: dict[int, Tensor] = {}
        self._raw: Tensor | None = None
        self._raw_total: Tensor | None = None
        self._base: Tensor | None = None
        self._units: dict[int, Tensor] = {}
        self._peaks: Tensor | None = None
        self._outdated: set[int] = set()
        self._left_memory = False

    def raw_norms(self) -> Tensor:
        """Return per-tensor norms as backward left them, reading every gradient once."""
        if self._raw is None:
            norms = self._spread(self._local_norms(self.held), self.held)
            for groups, index in self.layout.shards:
                norms, self.present, self.ride = gather_norms(
                    norms, self.present, index, groups, self.ride
                )
            self._raw = self._base = norms
        return self._raw

    def raw_norm(self) -> Tensor:
        """Return the global norm as backward left it."""
        if self._raw_total is None:
            self._raw_total = self.total(self.raw_norms())
        return self._raw_total

    def norms(self) -> Tensor:
        """Return per-tensor norms with what is pending applied."""
        return applied(self._settled(), self.factor)

    def norm(self) -> Tensor:
        """Return the global norm with what is pending applied."""
        if self._settled() is self._raw and (self.factor is None or self.factor.ndim == 0):
            return applied(self.raw_norm(), self.factor)
        return self.total(self.norms())

    def total(self, norms: Tensor) -> Tensor:
        """Return the L2 norm of per-tensor norms, over ``reduce_groups`` too."""
        total = _norms.vector_norm(norms)
        if not self.reduce_groups:
            return total
        return all_reduce(total.square(), "sum", self.reduce_groups).sqrt()

    def amaxes(self) -> Tensor:
        """Return the largest absolute element of each tensor, float32 ``[P]``."""
        if self._peaks is None:
            values = [self._peak(i).to(self.layout.device) for i in self.held]
            peaks = self._spread(torch.stack(values) if values else None, self.held)
            for groups, index in self.layout.shards:
                peaks = peaks.index_copy(0, index, all_reduce(peaks[index], "max", groups))
            self._peaks = peaks
        return applied(self._peaks, self.factor)

    def unit_norms(self, i: int) -> Tensor:
        """Return the norms of tensor i's output units with what is pending applied."""
        return applied(self._scaled_unit(i), self._factor_of(i))

    def read_units(self, indices: Iterable[int]) -> None:
        """Read unit norms before norms, so that one sweep of these tensors serves both."""
        for i in indices:
            if self.data[i] is not None and self.params[i].ndim > 1:
                self._unit(i)

    def scale(self, factor: Tensor) -> None:
        """Multiply the pending factor; NaN counts as 1."""
        if self.host and factor.ndim == 0 and (factor == 1 or factor != factor):
            return
        factor = torch.where(factor.isnan(), 1.0, factor)
        self.factor = factor if self.factor is None else self.factor * factor

    def scale_units(self, factors: Mapping[int, Tensor]) -> None:
        """Multiply the pending factors of output units; NaN counts as 1."""
        if not factors:
            return
        joined = torch.cat([factor.float() for factor in factors.values()])
        clean = torch.where(joined.isnan(), 1.0, joined)
        for i, factor in zip(
            factors, clean.split([f.numel() for f in factors.values()]), strict=True
        ):
            before = self.unit_factors.get(i)
            self.unit_factors[i] = factor if before is None else before * factor
        self._outdated.update(factors)
        self._peaks = None

    def was_written(self) -> None:
        """Note that everything pending is in memory now."""
        if self.factor is not None or self.unit_factors:
            self._base = self.norms()
            self._peaks = None if self._peaks is None else self.amaxes()
            self._units = {}
        self.factor = self.unscale = None
        self.unit_factors = {}

    def was_edited(self, indices: Iterable[int]) -> None:
        """Note that elements of these tensors changed in memory: read them again when asked."""
        for i in indices:
            self._units.pop(i, None)
            self._outdated.add(i)
            self._peaks = None

    @property
    def is_outdated(self) -> bool:
        """Whether asking for norms now would read memory again."""
        return bool(self._outdated)

    def keep(self, indices: Iterable[int]) -> None:
        """Note that an edit left these tensors as they were."""
        self._outdated.difference_update(indices)

    def leave_memory(self) -> None:
        """Work on copies from now on, so that nothing done here reaches the gradients."""
        if self._left_memory:
            return
        self._left_memory = True
        self.data = [None if data is None else data.clone() for data in self.data]

    def _factor_of(self, i: int) -> Tensor | None:
        return self.factor if self.factor is None or self.factor.ndim == 0 else self.factor[i]

    def _settled(self) -> Tensor:
        """Return ``_base`` after measuring again what unit factors or edits changed."""
        self.raw_norms()
        if self._outdated:
            indices = tuple(sorted(self._outdated))
            self._outdated.clear()
            again = self._spread(self._local_norms(self._only_held(indices)), indices)
            for groups, index in self.layout.shards:
                again, _, _ = gather_norms(again, self.present, index, groups, self.ride[:0])
            where = self.layout.subset(indices)
            assert self._base is not None
            self._base = self._base.index_copy(0, where, again[where])
        assert self._base is not None
        return self._base

    def _only_held(self, indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i in indices if self.data[i] is not None)

    def _local_norms(self, indices: tuple[int, ...]) -> Tensor | None:
        """Return norms of local data times unit factors, from unit norms where those are known."""
        if not self._units and indices:
            held = [self._held(i) for i in indices]
            return self._true(_norms.tensor_norms(held).to(self.layout.device))
        known = [i for i in indices if i in self._units and not self._is_cut(i)]
        rest = [i for i in indices if i not in self._units or self._is_cut(i)]
        parts = []
        if rest:
            read = _norms.tensor_norms([self._scaled(i) for i in rest])
            parts.append(self._true(read.to(self.layout.device)))
        if known:
            units = [self._scaled_unit(i) for i in known]
            parts.append(_norms.joined_norms(units, self.layout.device))
        if len(parts) < 2:
            return parts[0] if parts else None
        order = torch.tensor(sorted(range(len(indices)), key=(rest + known).__getitem__))
        return torch.cat(parts)[order.to(self.layout.device, non_blocking=True)]

    def _is_cut(self, i: int) -> bool:
        """Tell whether tensor i is cut across its units, so that unit norms are not local ones."""
        return is_cut_inside_units(self.params[i])

    def _unit(self, i: int) -> Tensor:
        if i not in self._units:
            self._units[i] = self._read_unit(i)
        return self._units[i]

    def _read_unit(self, i: int) -> Tensor:
        if self.data[i] is None:
            return torch.zeros(0, device=self.layout.device)
        if self.params[i].ndim <= 1:
            return self._settled()[i].view(1)
        units = self._true(_norms.unit_norms(self._held(i)))
        if self._is_cut(i):
            units = all_reduce(units.square(), "sum", shard_groups(self.params[i])).sqrt()
        return units

    def _scaled_unit(self, i: int) -> Tensor:
        return applied(self._unit(i), self.unit_factors.get(i))

    def _scaled(self, i: int) -> Tensor:
        data = self._held(i)
        if i in self.unit_factors:
            return data * over_units(self.unit_factors[i], data)
        return data

    def _peak(self, i: int) -> Tensor:
        data = self._scaled(i)
        if data.numel() == 0:
            return torch.zeros(())
        low, high = torch.aminmax(data.abs() if data.is_complex() else data)
        return self._true(torch.maximum(-low, high).float())

    def _held(self, i: int) -> Tensor:
        data = self.data[i]
        assert data is not None
        return data

    def _true(self, values: Tensor) -> Tensor:
        return values if self.unscale is None else values * self.unscale.to(values.device)

    def _spread(self, values: Tensor | None, indices: tuple[int, ...]) -> Tensor:
        """Put values of some tensors into a vector over all, zero elsewhere."""
        if values is not None and len(indices) == len(self.params):
            return values
        full = torch.zeros(len(self.params), device=self.layout.device)
        held = self._only_held(indices)
        return full if values is None else full.index_copy(0, self.layout.subset(held), values)


def applied(norms: Tensor, factor: Tensor | None) -> Tensor:
    """Return norms times a factor, where factor 0 gives 0 even if the norm is not finite."""
    if factor is None:
        return norms
    return torch.where(factor == 0, 0.0, norms * factor)


def over_units(factors: Tensor, data: Tensor) -> Tensor:
    """Shape one factor a unit so that it multiplies dim 0 of the data."""
    return factors.view(-1, *[1] * (data.ndim - 1)) if data.ndim > 1 else factors


def local_gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Return the dense local data of every parameter's gradient, None where there is none."""
    grads = [param.grad for param in params]
    if set(map(type, grads)) == {Tensor} and set(map(_LAYOUT, grads)) == {torch.strided}:
        return grads
    return [local_gradient(param) for param in params]


def local_gradient(param: Tensor) -> Tensor | None:
    """Return the dense local data of a parameter's gradient, None without one.

    A sparse gradient is coalesced first, since its norm and its elements mean nothing before.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.is_sparse:
        if not grad.is_coalesced():
            param.grad = grad = grad.coalesce()
        return grad._values()
    return local(grad)
