"""What a step does, counted operation by operation: bytes, kernels, collectives, host reads."""

from __future__ import annotations

import types
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name for it
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 - torch has no public name for it

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_COLLECTIVES = ("c10d", "_c10d_functional")
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero")
_COPIES = ("tolist", "numpy", "cpu")
_FREE = ("detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty")


@final
@dataclass(frozen=True)
class Counts:
    """What was counted between two moments on one rank."""

    collectives: float = 0
    payload: float = 0
    """Bytes handed to collectives."""
    reads: float = 0
    """Values read on the host: each stalls an accelerator."""
    bytes: float = 0
    """Bytes read and written by operations other than views and collectives."""
    kernels: float = 0
    """Operations that compute, each at least one kernel."""
    temporary: float = 0
    """Most bytes alive at once in tensors made meanwhile."""

    def minus(self, other: Counts) -> Counts:
        """Return what is more than in another count; the most alive at once is kept."""
        more = {
            field.name: getattr(self, field.name) - getattr(other, field.name)
            for field in fields(self)
        }
        return replace(Counts(**more), temporary=self.temporary)


def mean(several: Sequence[Counts]) -> Counts:
    """Return the mean of several counts, but the largest of what was alive at once."""
    sums = {
        field.name: sum(getattr(one, field.name) for one in several) / len(several)
        for field in fields(Counts)
    }
    return replace(Counts(**sums), temporary=max(one.temporary for one in several))


@final
class Counter(TorchDispatchMode):
    """Counts what runs within a ``with`` block, DTensors' local operations included.

    Example:
        >>> x = torch.ones(4)
        >>> with Counter() as counter:
        ...     _ = (x * 2).sum().item()
        >>> counter.counts.bytes, counter.counts.kernels, counter.counts.reads
        (52, 2, 1)
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums = dict.fromkeys((field.name for field in fields(Counts)), 0)
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._copies = _HostCopies(self._read)

    @property
    def counts(self) -> Counts:
        """What was seen so far."""
        return Counts(**self._sums)

    def __enter__(self) -> Counter:
        """Begin to count."""
        self._copies.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401 - Python's signature
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._copies.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401 - torch's signature
        args: Any = (),  # noqa: ANN401 - torch's signature
        kwargs: Any = None,  # noqa: ANN401 - torch's signature
    ) -> Any:  # noqa: ANN401 - torch's signature
        """Run an operation and add it up; of one on DTensors, what it becomes."""
        if any(_is_dtensor(kind) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        name, given = func.overloadpacket.__name__, _tensors((args, kwargs))
        made = _made(result, given)
        if func.namespace in _COLLECTIVES:
            self._collective(name, given)
        elif name in _READS or _leaves_device(name, given, kwargs):
            self._read()
        elif func.namespace == "aten" and name not in _FREE:
            self._sums["kernels"] += 1
            self._sums["bytes"] += sum(map(_bytes, given)) + sum(map(_bytes, made))
            self._sums["bytes"] += _written(func, args, kwargs)
        if made:
            self._born(made)
        return result

    def _collective(self, name: str, given: list[Tensor]) -> None:
        if "wait" not in name and "wrap" not in name:
            self._sums["collectives"] += 1
            self._sums["payload"] += sum(map(_bytes, given))

    def _read(self) -> None:
        self._sums["reads"] += 1

    def _born(self, made: list[Tensor]) -> None:
        """Add new tensors to those alive, and see how much lives now."""
        for tensor in made:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: kept for k, kept in self._alive.items() if not kept[0].expired()}
        alive = sum(size for _, size in self._alive.values())
        self._sums["temporary"] = max(self._sums["temporary"], alive)


@final
class _HostCopies(TorchFunctionMode):
    """Notices copies to the host that torch does not dispatch for tensors on a CPU."""

    def __init__(self, seen: Callable[[], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401 - torch's signature
        args: Any = (),  # noqa: ANN401 - torch's signature
        kwargs: Any = None,  # noqa: ANN401 - torch's signature
    ) -> Any:  # noqa: ANN401 - torch's signature
        """Note a copy and pass on."""
        if getattr(func, "__name__", "") in _COPIES:
            self._seen()
        return func(*args, **(kwargs or {}))


def held(root: object) -> int:
    """Return the bytes of all tensors that stablekit's objects hold, from one of them on.

    Parameters and their gradients are not stablekit's, nor are models and optimizers.
    """
    storages: dict[int, int] = {}
    for tensor in _reachable(root):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _reachable(root: object) -> Iterator[Tensor]:
    seen: set[int] = set()
    waiting: list[object] = [root]
    kept: list[object] = []
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        kept.append(thing)
        if isinstance(thing, Tensor):
            if not isinstance(thing, torch.nn.Parameter) and type(thing) is Tensor:
                yield thing
        else:
            waiting.extend(_parts(thing))


def _parts(thing: object) -> list[object]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return list(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__self__]
    if not type(thing).__module__.startswith("stablekit"):
        return []
    slots = [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    return [*vars(thing).values(), *slots] if hasattr(thing, "__dict__") else slots


def _is_dtensor(kind: type) -> bool:
    return kind.__name__ == "DTensor"


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _made(result: object, given: list[Tensor]) -> list[Tensor]:
    """Return the results that are in memory of their own."""
    before = {tensor.untyped_storage()._cdata for tensor in given}
    return [t for t in _tensors(result) if t.untyped_storage()._cdata not in before]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _written(func: Any, args: Any, kwargs: Any) -> int:  # noqa: ANN401 - torch's types
    """Return the bytes of the arguments that an operation changes in place."""
    total = 0
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            total += sum(map(_bytes, _tensors(value)))
    return total


def _leaves_device(name: str, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if name != "_to_copy" or device is None or not given:
        return False
    return torch.device(device).type == "cpu" and given[0].device.type != "cpu"
