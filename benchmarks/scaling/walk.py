"""A step followed from plugin to plugin: what is known, what is pending, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from benchmarks.scaling import operations as ops
from benchmarks.scaling.cost import FLOAT, Cost, Reduction
from benchmarks.scaling.small import NOTHING, Linear, Small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.members import Member
    from benchmarks.scaling.sizes import Held, Mesh

RIDERS = 4
"""Overflow, what is not finite elsewhere, the loss, and how many ranks have one."""
RIDERS_OF_A_STAGE = 2
"""The first two of these."""

FACTORS = {"all", "tensor"}


@final
@dataclass
class Walk:
    """Follows what is known and what is pending through a chain, as the ledger of a step does."""

    held: Held
    mesh: Mesh
    device_mode: bool
    reductions: list[Reduction] = field(default_factory=list)
    passes: float = 0
    stored: float = 0
    each: float = 0
    batched: int = 0
    small: Small = ops.CORE
    pending: set[str] = field(default_factory=set)
    is_raw: bool = True
    is_unscaled: bool = True
    is_stale: bool = False
    knows_units: bool = False
    knows_peaks: bool = False
    knows_loss: bool = False
    largest: float = 0

    def open(self, members: Sequence[Member]) -> None:
        """Read norms and agree on them, with all that was announced."""
        self.passes = 1
        floats = 2 * self.held.tensors
        if any("units" in member.asks for member in members):
            self.passes += 1  # the weights
            self.knows_units = True
            floats += 2 * self.held.units + self.held.vectors
        if self.mesh.is_cut:
            self.small += ops.CUT
            self._leave_out_copies(of_units=self.knows_units)
            self._agree(floats, riders=True)
        if self.mesh.pipeline > 1:
            self.small += ops.STAGES
        self._total(riders=True)

    def visit(self, member: Member) -> None:
        """Do what a plugin asks for, then what it does."""
        self.small += member.small
        if self.mesh.is_cut:
            self.small += member.small_cut
        for what in member.asks:
            getattr(self, f"_ask_{what}")()
        if self.device_mode:
            if member.acts == "element":
                self._edit()
            elif member.acts:
                self._scale(member.acts)

    def close(self, *, fused: bool, log_every: int) -> None:
        """Write what is pending, or leave it to the kernel; read norms again for the log."""
        if self.pending == {"all"} and fused:
            self.stored = 1
            self.small += ops.APPLIED + ops.INVERTED
        elif self.pending:
            self._write()
        self._record(1 / max(log_every, 1))

    def cost(self, members: Sequence[Member]) -> Cost:
        """Return the sums."""
        small = self.small.bytes.of(self.held)
        return Cost(
            reductions=tuple(self.reductions),
            passes=self.passes + self.stored,
            stored=self.stored,
            bytes=self.passes * self.held.elements * self.held.itemsize + small,
            kernels=self.small.kernels.of(self.held),
            kernels_once=self.small.kernels.once,
            each=self.each,
            batched=1 + self.batched,
            temporary=self._temporary(members),
        )

    def _record(self, share: float) -> None:
        """Record the norm of what is stepped with, where it can be told without other ranks."""
        is_alone = not self.mesh.is_cut and self.mesh.pipeline == 1
        if self.is_stale:
            if is_alone:
                self.passes += share
                self.small += (ops.AGAIN + ops.ONE_NORM + ops.RECORDED).times(share)
        elif self.is_unscaled:
            self.small += ops.RECORDED
        elif self.mesh.pipeline == 1:
            self.small += ops.ONE_NORM + ops.RECORDED

    @property
    def _has_copies(self) -> bool:
        """Whether others count the same: all with ``replicate``, vectors with ``tensor``."""
        return self.mesh.replicate > 1 or (self.mesh.tensor > 1 and self.held.vectors > 0)

    def _leave_out_copies(self, *, of_units: bool = False) -> None:
        if self._has_copies:
            self.small += ops.COPIES
            if of_units:
                self.small += ops.COPIED_UNITS if self.mesh.replicate > 1 else ops.COPIED_VECTORS

    def _temporary(self, members: Sequence[Member]) -> float:
        """Return the most that lives at once: no two plugins' own values do."""
        here, agreed, once = self.held, 0, 8
        if self.mesh.is_cut:
            by_units = any("units" in member.asks for member in members)
            agreed = 9 * here.tensors + (4 * here.vectors + 8 * here.units if by_units else 0)
            once = 26 if self._has_copies else 22
        most = [member.temporary.of(here) + agreed for member in members]
        return max(*most, self.largest, once * here.tensors + 100)

    def _ask_norm(self) -> None:
        self._read_again()
        if not self.is_raw or "tensor" in self.pending:
            self.small += ops.ONE_NORM
            self._apply()
            self._total()
        elif self.pending:
            self.small += ops.APPLIED_TO_ONE

    def _ask_norms(self) -> None:
        self._read_again()
        self._apply()

    def _apply(self) -> None:
        if self.pending & FACTORS:
            self.small += ops.APPLIED

    def _read_again(self) -> None:
        if self.is_stale:
            self.passes += 1
            self.small += ops.AGAIN
            self.is_stale = False
            if self.mesh.is_cut:
                self.small += ops.AGREED_AGAIN
                self._leave_out_copies()
                self._agree(self.held.tensors)

    def _ask_units(self) -> None:
        if not self.knows_units:
            self.passes += 1
            self.knows_units = True
            if self.mesh.is_cut:
                self._agree(self.held.tensors + self.held.units)
        elif self.pending & FACTORS:
            self.small += ops.UNITS_LATER

    def _ask_amaxes(self) -> None:
        if self.knows_peaks:
            return
        self.knows_peaks = True
        self.passes += 1
        self.small += ops.AMAXES
        self._apply()
        if "unit" in self.pending:
            self.small += ops.AMAXES_OF_UNITS
            if self.mesh.shard > 1:
                self.small += ops.AMAXES_OF_ROWS
            self.passes += 2  # each tensor times its units, in a copy
            self.largest = self.held.largest * self.held.itemsize
        if self.mesh.is_cut:
            self.small += ops.AMAXES_CUT
            self._agree(2 * self.held.tensors)

    def _ask_loss(self) -> None:
        if self.knows_loss or self.mesh.ranks == 1:
            return
        self.knows_loss = True
        if self.mesh.is_cut:
            self.small += ops.LOSS_RIDES
        if self.mesh.is_cut and self.mesh.pipeline == 1:
            self.small += ops.LOSS_SHARED
        else:
            self.small += ops.LOSS_ALONE
            self.reductions.append(Reduction(tuple(self.mesh.dims), 2 * FLOAT))

    def _ask_metrics(self) -> None:
        """Costs a read on the host only."""

    def _scale(self, what: str) -> None:
        if what in FACTORS and self.pending & FACTORS:
            self.small += ops.MULTIPLIED
        self.pending.add(what)
        self.is_unscaled = False
        if what == "unit":
            self.small += ops.SCALED_UNITS
            self.is_raw = self.knows_peaks = False

    def _edit(self) -> None:
        if self.pending:
            self._write()
        self.passes += 2
        self.small += Small(Linear(tensor=1))
        self.is_stale = True
        self.knows_units = self.knows_peaks = self.is_raw = self.is_unscaled = False

    def _write(self) -> None:
        """Read and write all gradients once."""
        self.passes += 2
        self._apply()
        if self.knows_peaks:
            self._apply()
        if self.pending == {"all"}:
            self.batched += 1
            self.small += ops.WRITTEN
        elif "unit" not in self.pending:
            self.each += self.held.tensors
        self.pending.clear()
        self.knows_units = self.is_raw = False

    def _agree(self, floats: int, *, riders: bool = False) -> None:
        """Reduce over the ranks that hold parts: all at once if that is all, else way by way."""
        if self.mesh.pipeline == 1:
            more = RIDERS if riders else 0
            self.reductions.append(Reduction(self.mesh.holding, FLOAT * (floats + more)))
            return
        more = RIDERS_OF_A_STAGE if riders else 0
        self.reductions += [Reduction((way,), FLOAT * (floats + more)) for way in self.mesh.holding]

    def _total(self, *, riders: bool = False) -> None:
        if self.mesh.pipeline > 1:
            self.small += NOTHING if riders else ops.TOTAL
            floats = 1 + (RIDERS_OF_A_STAGE if riders else 0)
            self.reductions.append(Reduction(("pipeline",), FLOAT * floats))
