"""Global norms of parameters that are whole here and others on other ranks: stages, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from stablekit import _norms
from stablekit._sharding import all_reduce
from stablekit.errors import AttachError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stablekit._layout import Layout

_ALL = "*"


@final
class ReduceGroups:
    """Process groups over which squared norms add up: ``reduce_groups=`` of ``attach``."""

    def __init__(self, given: Any = None) -> None:  # noqa: ANN401 - checked here
        """Take a sequence of groups, for all parameters, or groups by name pattern.

        Raises:
            TypeError: What is given is neither.
            AttachError: This rank is not in one of the groups.
        """
        by_pattern = given if isinstance(given, Mapping) else {_ALL: given or ()}
        self._entries = [(pattern, _group_list(found)) for pattern, found in by_pattern.items()]
        self._entries = [(pattern, groups) for pattern, groups in self._entries if groups]
        self._layout: Layout | None = None
        self._codes = torch.empty(0)
        self._members: list[Tensor] = []

    def __len__(self) -> int:
        """Return how many reductions a global norm takes."""
        return sum(len(groups) for _, groups in self._entries)

    @property
    def ranks(self) -> frozenset[int]:
        """All ranks of all groups."""
        groups = (group for _, groups in self._entries for group in groups)
        return frozenset[int]().union(*map(dist.get_process_group_ranks, groups))

    @property
    def patterns(self) -> list[str]:
        """A pattern for each reduction, in order."""
        return [pattern for pattern, groups in self._entries for _ in groups]

    def total(
        self, norms: Tensor, layout: Layout, chosen: tuple[int, ...] | None, ride: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the L2 norm of per-tensor norms over all groups, and the sum of what rides along.

        Args:
            norms: of all parameters, or of those chosen.
            layout: of all parameters.
            chosen: positions of the norms.
            ride: a vector that is summed over every group.
        """
        if not self._entries:
            return _norms.vector_norm(norms), ride
        if self._is_for_all:
            squares = torch.cat([_norms.vector_norm(norms).square().view(1), ride])
            total, ride = all_reduce(squares, "sum", self._entries[0][1]).split([1, ride.numel()])
            return total.view(()).sqrt(), ride
        sums = self._sums(norms, layout, chosen)
        for members, (_, groups) in zip(self._members, self._entries, strict=True):
            reduced = all_reduce(torch.cat([sums[members], ride]), "sum", groups)
            added, ride = reduced.split([members.numel(), ride.numel()])
            sums = sums.index_copy(0, members, added)
        return sums.sum().sqrt(), ride

    @property
    def _is_for_all(self) -> bool:
        return [pattern for pattern, _ in self._entries] == [_ALL]

    def _sums(self, norms: Tensor, layout: Layout, chosen: tuple[int, ...] | None) -> Tensor:
        """Return sums of squares by the patterns that match: as many, whatever parameters are here.

        Sum number n is of the parameters that match the patterns whose bits are set in n.
        """
        if self._layout is not layout:
            self._layout = layout
            self._codes, self._members = self._sorted(layout)
        codes = self._codes if chosen is None else self._codes[layout.subset(chosen)]
        sums = torch.zeros(1 << len(self._entries), device=norms.device)
        return sums.index_add(0, codes, norms.square())

    def _sorted(self, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Return the sum each parameter belongs to, and the sums each pattern is about."""
        patterns = list(enumerate(pattern for pattern, _ in self._entries))
        codes = [sum(fnmatchcase(name, p) << bit for bit, p in patterns) for name in layout.names]
        numbers = range(1 << len(patterns))
        members = [[number for number in numbers if number >> bit & 1] for bit, _ in patterns]
        home = layout.device
        whole = torch.tensor(codes, dtype=torch.long, device=home)
        return whole, [torch.tensor(one, device=home) for one in members]


def _group_list(given: Any) -> list[ProcessGroup]:  # noqa: ANN401 - checked here
    groups = list(given) if isinstance(given, Sequence) else [given]
    for group in groups:
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise AttachError(
                "this rank is not in one of the reduce_groups; give every rank the group it is in"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "reduce_groups must hold process groups, as torch.distributed.new_group and"
                f" DeviceMesh.get_group return them; got {group!r}"
            )
    return groups
