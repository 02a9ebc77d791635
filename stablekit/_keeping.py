"""Copies of nested values in CPU memory, and putting them back where they were taken from."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit._sharding import is_dtensor, local

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]


@final
class Kept:
    """One tensor, or this rank's part of a DTensor, in CPU memory; pinned where it is CUDA's."""

    __slots__ = ("data", "device", "placing")

    def __init__(self, tensor: Tensor, spare: Spare) -> None:
        """Copy the tensor; the copy is complete when this returns."""
        part = local(tensor.detach())
        self.device = part.device
        self.data = spare.like(part).copy_(part)
        self.placing: Any = None
        if is_dtensor(tensor):
            whole: Any = tensor
            self.placing = (whole.device_mesh, whole.placements, whole.shape, whole.stride())

    def fits(self, current: object) -> bool:
        """Tell whether the copy can be written into this tensor."""
        if not isinstance(current, Tensor) or is_dtensor(current) != (self.placing is not None):
            return False
        part = local(current.detach())
        return part.shape == self.data.shape and part.dtype == self.data.dtype

    def write_to(self, current: Tensor) -> None:
        """Write the copy into a tensor."""
        local(current.detach()).copy_(self.data)

    def build(self) -> Tensor:
        """Return a new tensor where the old one was."""
        part = self.data.to(self.device, copy=True)
        if self.placing is None:
            return part
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.placing
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )


@final
class Spare:
    """Memory of copies that are not needed any more; new pages cost ten times the copying."""

    def __init__(self, kept: Iterable[Kept] = ()) -> None:
        """Take over the memory of these."""
        self._free: dict[_Form, list[Tensor]] = {}
        for one in kept:
            if one.data.layout is torch.strided:
                form = _form(one.data, pinned=one.device.type == "cuda")
                self._free.setdefault(form, []).append(one.data)

    def like(self, tensor: Tensor) -> Tensor:
        """Return CPU memory for a copy of a tensor."""
        pinned = tensor.device.type == "cuda"
        if tensor.layout is not torch.strided:
            return torch.empty_like(tensor, device="cpu")
        free = self._free.get(_form(tensor, pinned=pinned))
        if free:
            return free.pop()
        return torch.empty_like(tensor, device="cpu", pin_memory=pinned)


def _form(tensor: Tensor, *, pinned: bool) -> _Form:
    return tensor.shape, tensor.stride(), tensor.dtype, pinned


@final
class Keeper:
    """Copies nested values: containers and tensors, each tensor once however often it occurs."""

    def __init__(self, spare: Spare, *, shared: Iterable[Tensor] = (), deep: bool = False) -> None:
        """Start with nothing kept.

        Args:
            spare: memory to use first.
            shared: tensors that are kept elsewhere, and are the same objects in every copy.
            deep: copy objects of other kinds too, instead of keeping them themselves.
        """
        self.tensors: list[Kept] = []
        self._spare = spare
        self._deep = deep
        self._shared = {id(one) for one in shared}
        self._known: dict[int, tuple[Tensor, Kept]] = {}

    def keep(self, value: Any) -> Any:  # noqa: ANN401 - any nested value
        """Return a copy in which every tensor is a :class:`Kept`."""
        if isinstance(value, Tensor):
            return value if id(value) in self._shared else self._keep_tensor(value)
        if type(value) in _MAPPINGS:
            kept = copy.copy(value)
            kept.update((key, self.keep(item)) for key, item in value.items())
            return kept
        if type(value) in _SEQUENCES:
            return _like(value, [self.keep(item) for item in value])
        return copy.deepcopy(value) if self._deep else value

    def _keep_tensor(self, tensor: Tensor) -> Kept:
        if id(tensor) not in self._known:
            kept = Kept(tensor, self._spare)
            self.tensors.append(kept)
            self._known[id(tensor)] = tensor, kept
        return self._known[id(tensor)][1]


@final
class Returner:
    """Puts kept values back, into the tensors and containers that are there now where they fit."""

    def __init__(self, *, deep: bool = False) -> None:
        """Start with nothing written.

        Args:
            deep: hand out copies of objects of other kinds, as they were kept.
        """
        self._deep = deep
        self._done: dict[int, Tensor] = {}
        self._taken: set[int] = set()

    def put_back(self, kept: Any, current: Any = None) -> Any:  # noqa: ANN401 - any nested value
        """Return the value that was kept; what ``current`` holds is used for it where it can be."""
        if isinstance(kept, Kept):
            return self._put_tensor(kept, current)
        if type(kept) in _MAPPINGS:
            is_alike = type(current) is type(kept)
            beside = current if is_alike else {}
            items = {key: self.put_back(item, beside.get(key)) for key, item in kept.items()}
            result = current if is_alike else copy.copy(kept)
            result.clear()
            result.update(items)
            return result
        if type(kept) in _SEQUENCES:
            return self._put_sequence(kept, current)
        return copy.deepcopy(kept) if self._deep and not isinstance(kept, Tensor) else kept

    def _put_sequence(self, kept: Any, current: Any) -> Any:  # noqa: ANN401 - any sequence
        is_aligned = isinstance(current, (list, tuple, deque)) and len(current) == len(kept)
        beside = current if is_aligned else [None] * len(kept)
        items = [self.put_back(item, now) for item, now in zip(kept, beside, strict=True)]
        if type(kept) is list and type(current) is list:
            current[:] = items
            return current
        return _like(kept, items)

    def _put_tensor(self, kept: Kept, current: object) -> Tensor:
        """Write into the current tensor, unless something else was put there already."""
        if id(kept) not in self._done:
            if isinstance(current, Tensor) and id(current) not in self._taken:
                result = current if kept.fits(current) else kept.build()
            else:
                result = kept.build()
            if result is current:
                kept.write_to(result)
            self._taken.add(id(result))
            self._done[id(kept)] = result
        return self._done[id(kept)]


def _like(sequence: Any, items: list[Any]) -> Any:  # noqa: ANN401 - any sequence
    return deque(items, sequence.maxlen) if type(sequence) is deque else type(sequence)(items)
