"""The books of one step's gradients: what was read, and what is still to be multiplied."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from stablekit import _norms
from stablekit._reduce_groups import ReduceGroups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stablekit._memory import Memory

    Bookmark = tuple[dict[int, Tensor], set[int], Tensor | None]


@final
class Ledger:
    """Norms are read from memory once; factors wait here until they are written once.

    Pending are ``unit_factors`` (position -> one factor an output unit) and ``factor`` (None for
    one, 0-dim for all tensors, or ``[P]``). Known are ``_units``, the unit norms of memory, and
    ``_base`` and ``_peaks``, norms and largest elements of memory times unit factors. ``_stale``
    are the positions where ``_base`` is out of date; it is the same set on every rank, whatever
    parts a rank holds, since all must agree on when to measure again.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        host: bool,
        dry_run: bool = False,
        reduce_groups: ReduceGroups | None = None,
        units: Iterable[int] = (),
        weights: Iterable[int] = (),
    ) -> None:
        """Read the gradients as backward left them: one sweep, one reduction where they are cut.

        Args:
            memory: the gradients.
            host: whether values may be read on the host.
            dry_run: whether edits must not reach the gradients.
            reduce_groups: further process groups over which squared norms add up. What rides in the
                first reductions over spans rides on over these, its first two elements.
            units: positions whose unit norms will be asked for, so that one sweep serves both.
            weights: positions whose parameters' unit norms will be asked for, likewise.
        """
        self.memory = memory
        self.layout = memory.layout
        self.host = host
        self.dry_run = dry_run
        self.reduce_groups = ReduceGroups() if reduce_groups is None else reduce_groups
        self.factor: Tensor | None = None
        self.unit_factors: dict[int, Tensor] = {}
        self._stale: set[int] = set()
        self._peaks: Tensor | None = None
        self._left_memory = False
        units = tuple(units)
        cut = [i for i in weights if i in self.layout.on_mesh]
        norms = self.layout.others(units)
        self._base, self._units, self._weights = memory.read(norms, units, cut, first=True)
        self._derive(i for i in units if memory.has_rows(i))
        self._raw = self._base
        self._raw_total = self._first_total()

    def raw_norms(self) -> Tensor:
        """Return per-tensor norms as backward left them."""
        return self._raw

    def raw_norm(self) -> Tensor:
        """Return the global norm as backward left it."""
        return self._raw_total

    def norms(self) -> Tensor:
        """Return per-tensor norms with what is pending applied."""
        return applied(self._settled(), self.factor)

    def norm(self) -> Tensor:
        """Return the global norm with what is pending applied."""
        if self._settled() is self._raw and (self.factor is None or self.factor.ndim == 0):
            return applied(self._raw_total, self.factor)
        return self.total(self.norms())

    def total(self, norms: Tensor, chosen: tuple[int, ...] | None = None) -> Tensor:
        """Return the L2 norm of per-tensor norms, over ``reduce_groups`` too.

        Args:
            norms: of all tensors, or of those at the chosen positions.
            chosen: these positions.
        """
        return self.reduce_groups.total(norms, self.layout, chosen, self.memory.ride[:0])[0]

    def _first_total(self) -> Tensor:
        """Return the global norm, not finite if some rank has heard of such a tensor elsewhere."""
        memory = self.memory
        ride = memory.ride[:2] if self.reduce_groups else memory.ride[:0]
        total, ride = self.reduce_groups.total(self._raw, self.layout, None, ride)
        if len(ride):
            memory.ride = torch.cat([ride, memory.ride[2:]])
        return total + memory.ride[1] if memory.listened or len(ride) else total

    @property
    def is_shared(self) -> bool:
        """Whether norms are agreed on with other ranks."""
        return bool(self.layout.spans or self.reduce_groups)

    @property
    def knows_norm(self) -> bool:
        """Whether the norm can be told without reading memory and without other ranks."""
        if any(i not in self._units for i in self._stale):
            return False
        is_one_factor = self.factor is None or self.factor.ndim == 0
        is_raw = self._base is self._raw and not self._stale
        return not self.reduce_groups or (is_raw and is_one_factor)

    def amaxes(self) -> Tensor:
        """Return the largest absolute element of each tensor, float32 ``[P]``."""
        if self._peaks is None:
            self._peaks = self.memory.largest(self.unit_factors)
        return applied(self._peaks, self.factor)

    def unit_norms(self, positions: Sequence[int]) -> list[Tensor]:
        """Return the norms of these tensors' output units with what is pending applied."""
        if missing := [i for i in positions if i not in self._units]:
            self._units.update(self.memory.read(units=missing).units)
        scaled = zip(positions, self._scaled_units(positions), strict=True)
        return [applied(units, self._factor_of(i)) for i, units in scaled]

    def weight_unit_norms(self, positions: Sequence[int]) -> list[Tensor]:
        """Return the norms of these parameters' own output units."""
        if missing := [i for i in positions if i not in self._weights]:
            self._weights.update(self.memory.read(weights=missing).weights)
        return [self._weights[i] for i in positions]

    def scale(self, factor: Tensor) -> None:
        """Multiply the pending factor; NaN counts as 1."""
        factor = factor.nan_to_num(1.0, math.inf, -math.inf)
        if self.host and bool((factor == 1).all()):
            return
        self.factor = factor if self.factor is None else self.factor * factor

    def scale_units(self, factors: Mapping[int, Tensor]) -> None:
        """Multiply the pending factors of output units; NaN counts as 1."""
        if not factors:
            return
        joined = torch.cat(list(factors.values())).detach().to(self.layout.device, torch.float32)
        joined = joined.nan_to_num(1.0, math.inf, -math.inf)
        sizes = tuple(factor.numel() for factor in factors.values())
        acting = dict(zip(factors, joined.split(sizes), strict=True))
        if self.host:
            acts = _norms.joined_any(joined != 1, sizes)
            acting = {i: f for (i, f), act in zip(acting.items(), acts, strict=True) if act}
        for i, factor in acting.items():
            before = self.unit_factors.get(i)
            self.unit_factors[i] = factor if before is None else before * factor
        if acting:
            self._stale.update(acting)
            self._peaks = None

    def was_written(self) -> None:
        """Note that everything pending is in memory now."""
        if self.factor is not None or self.unit_factors:
            self._derive(i for i in self._stale if i in self._units)
            self._base = applied(self._base, self.factor)
            self._peaks = None if self._peaks is None else applied(self._peaks, self.factor)
            self._units = {}
        self.factor = self.memory.unscale = None
        self.unit_factors = {}

    def kernel_wrote(self) -> None:
        """Note that a fused kernel multiplied by what was left to it, and wrote that to memory."""
        if self.dry_run:
            self.memory.unscale = None if not self._left_memory else self.memory.unscale
        else:
            self.was_written()

    def was_edited(self, positions: Iterable[int]) -> None:
        """Note that elements of these tensors changed in memory: read them again when asked."""
        for i in positions:
            self._units.pop(i, None)
            self._stale.add(i)
            self._peaks = None

    def bookmark(self) -> Bookmark:
        """Return what is known now, to come back to."""
        return dict(self._units), set(self._stale), self._peaks

    def go_back(self, bookmark: Bookmark) -> None:
        """Know again what was known at a bookmark, which memory still agrees with."""
        units, stale, self._peaks = bookmark
        self._units, self._stale = dict(units), set(stale)

    def leave_memory(self) -> None:
        """Work on copies from now on, so that nothing done here reaches the gradients."""
        if not self._left_memory:
            self._left_memory = True
            self.memory.leave()

    def _settled(self) -> Tensor:
        """Return ``_base`` after measuring again what unit factors or edits changed."""
        if self._stale:
            stale = sorted(self._stale)
            by_units = [i for i in stale if i in self.unit_factors or i in self._units]
            again = tuple(i for i in stale if i not in by_units)
            missing = [i for i in by_units if i not in self._units]
            if again or missing:
                read = self.memory.read(again, missing)
                where = self.layout.subset(again)
                self._base = self._base.index_copy(0, where, read.norms[where])
                self._units.update(read.units)
                self._stale.difference_update(again)
            self._derive(by_units)
        return self._base

    def _derive(self, positions: Iterable[int]) -> None:
        """Renew norms of tensors whose unit norms are known, without reading memory."""
        known = tuple(sorted(positions))
        if known:
            norms = _norms.joined_norms(self._scaled_units(known), self.layout.device)
            self._base = self._base.index_copy(0, self.layout.subset(known), norms)
            self._stale.difference_update(known)

    def _scaled_units(self, positions: Sequence[int]) -> list[Tensor]:
        """Return unit norms times what is pending for each unit, multiplied all at once."""
        norms = {i: self._units[i] for i in positions}
        acting = [i for i in norms if i in self.unit_factors]
        if acting:
            whole = torch.cat([norms[i] for i in acting])
            scaled = applied(whole, torch.cat([self.unit_factors[i] for i in acting]))
            sizes = [norms[i].numel() for i in acting]
            norms.update(zip(acting, scaled.split(sizes), strict=True))
        return [norms[i] for i in positions]

    def _factor_of(self, i: int) -> Tensor | None:
        return self.factor if self.factor is None or self.factor.ndim == 0 else self.factor[i]


def applied(norms: Tensor, factor: Tensor | None) -> Tensor:
    """Return norms times a factor, where factor 0 gives 0 even if the norm is not finite."""
    if factor is None:
        return norms
    return torch.where(factor == 0, 0.0, norms * factor.abs())
