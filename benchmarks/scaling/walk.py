"""A step followed from plugin to plugin: what is known, what is pending, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from benchmarks.scaling.cost import FLOAT, Cost, Reduction
from benchmarks.scaling.small import Linear, Small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.members import Member
    from benchmarks.scaling.sizes import Held, Mesh

RIDERS = 4
"""Overflow, what is not finite elsewhere, the loss, and how many ranks have one."""
RIDERS_OF_A_STAGE = 2
"""The first two of these."""

CORE = Small(Linear(8), Linear(39, tensor=16))
CUT = Small(Linear(19), Linear(220, tensor=131))
AMAXES = Small(Linear(1, tensor=3), Linear(9, tensor=26))
AMAXES_CUT = Small(Linear(9), Linear(0, tensor=100))
AGAIN = Small(Linear(8), Linear(20, tensor=60))
"""Norms read again after elements changed."""
UNITS_LATER = Small(Linear(tensor=6), Linear(tensor=60, unit=18))
"""Unit norms asked for while a factor waits."""


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
    small: Small = CORE
    pending: set[str] = field(default_factory=set)
    is_raw: bool = True
    is_stale: bool = False
    knows_units: bool = False
    knows_peaks: bool = False
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
            self.small += CUT
            self._agree(floats, riders=True)
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
        if self.is_stale and self.mesh.pipeline == 1 and not self.mesh.is_cut:
            self.passes += 1 / max(log_every, 1)
        if self.pending == {"all"} and fused:
            self.stored = 1
        elif self.pending:
            self._write()

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

    def _temporary(self, members: Sequence[Member]) -> float:
        """Return the most that lives at once: no two plugins' own values do."""
        agreed = 9 * self.held.tensors if self.mesh.is_cut else 0
        most = [member.temporary.of(self.held) + agreed for member in members]
        return max(*most, self.largest, (32 if agreed else 12) * self.held.tensors)

    def _ask_norm(self) -> None:
        self._ask_norms()
        if not self.is_raw or "tensor" in self.pending:
            self._total()

    def _ask_norms(self) -> None:
        if self.is_stale:
            self.passes += 1
            self.small += AGAIN
            self.is_stale = False
            if self.mesh.is_cut:
                self._agree(self.held.tensors)

    def _ask_units(self) -> None:
        if not self.knows_units:
            self.passes += 1
            self.knows_units = True
            if self.mesh.is_cut:
                self._agree(self.held.tensors + self.held.units)
        elif self.pending:
            self.small += UNITS_LATER

    def _ask_amaxes(self) -> None:
        if self.knows_peaks:
            return
        self.knows_peaks = True
        self.passes += 1
        self.small += AMAXES
        if "unit" in self.pending:
            self.passes += 2  # each tensor times its units, in a copy
            self.largest = self.held.largest * self.held.itemsize
        if self.mesh.is_cut:
            self.small += AMAXES_CUT
            self._agree(2 * self.held.tensors)

    def _ask_loss(self) -> None:
        rides = self.mesh.pipeline == 1 and self.mesh.is_cut
        if self.mesh.ranks > 1 and not rides:
            self.reductions.append(Reduction(tuple(self.mesh.dims), 2 * FLOAT))

    def _ask_metrics(self) -> None:
        """Costs a read on the host only."""

    def _scale(self, what: str) -> None:
        self.pending.add(what)
        if what == "unit":
            self.is_raw = self.knows_peaks = False

    def _edit(self) -> None:
        if self.pending:
            self._write()
        self.passes += 2
        self.small += Small(Linear(tensor=1))
        self.is_stale = True
        self.knows_units = self.knows_peaks = self.is_raw = False

    def _write(self) -> None:
        """Read and write all gradients once."""
        self.passes += 2
        if self.pending == {"all"}:
            self.batched += 1
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
            floats = 1 + (RIDERS_OF_A_STAGE if riders else 0)
            self.reductions.append(Reduction(("pipeline",), FLOAT * floats))
