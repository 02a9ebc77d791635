"""Keeping a step from happening although the optimizer's ``step`` runs, and giving all back after.

A pre-hook cannot cancel a step. Without gradients most optimizers do nothing, but many count the
call in their groups, on themselves or in their state. So ``step`` runs on a stand-in that owns
copies of everything it could count in and whose groups are empty.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

_SMALL = 16


@final
class Withheld:
    """The gradients of one optimizer, hidden for one step."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Hide every gradient of the optimizer's parameters."""
        self._grads: list[tuple[Tensor, Tensor]] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._grads.append((param, param.grad))
                    param.grad = None

    def give_back(self) -> None:
        """Put the gradients back, except where a new one has come since."""
        for param, grad in self._grads:
            if param.grad is None:
                param.grad = grad
        self._grads = []


@final
class Loan:
    """Attributes set on an optimizer for one step, and what they were before."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Remember nothing yet."""
        self._optimizer = optimizer
        self._lent: dict[str, tuple[bool, object, object]] = {}

    def set(self, name: str, value: object) -> None:
        """Set an attribute until :meth:`give_back`."""
        had = name in vars(self._optimizer)
        self._lent[name] = (had, getattr(self._optimizer, name, None), value)
        setattr(self._optimizer, name, value)

    def give_back(self) -> None:
        """Restore the attributes that are still as they were set."""
        for name, (had, before, ours) in self._lent.items():
            if getattr(self._optimizer, name, None) is not ours:
                continue
            if had:
                setattr(self._optimizer, name, before)
            else:
                delattr(self._optimizer, name)
        self._lent = {}


def stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same class on which ``step`` can count without being noticed."""
    return _Copier(optimizer).twin(optimizer)


@final
class Bookkeeping:
    """What an optimizer counts outside of tensors it only writes to where there are gradients."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Note everything by reference, cheaply: most steps with a closure are not skipped."""
        self._optimizer = optimizer
        self._groups = [
            {k: _noted(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._state = {key: _noted(value) for key, value in optimizer.state.items()}
        self._own = {k: _noted(v) for k, v in vars(optimizer).items() if not is_structure(k)}

    def hold(self) -> None:
        """Copy the small tensors noted, before the optimizer counts in place."""
        self._groups = [_noted(group, clone=True) for group in self._groups]
        self._state = _noted(self._state, clone=True)
        self._own = _noted(self._own, clone=True)

    def restore(self) -> None:
        """Put all that was noted back in place."""
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in [k for k in group if k != "params" and k not in saved]:
                del group[key]
            group.update(saved)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        own = vars(self._optimizer)
        for key in [k for k in own if not is_structure(k) and k not in self._own]:
            del own[key]
        own.update(self._own)


def _noted(value: Any, *, clone: bool = False) -> Any:  # noqa: ANN401 - any bookkeeping value
    if isinstance(value, Tensor):
        is_counter = clone and value.numel() <= _SMALL and not value.requires_grad
        return value.clone() if is_counter else value
    if type(value) in (list, tuple, set):
        return type(value)(_noted(item, clone=clone) for item in value)
    if type(value) is dict:
        return {key: _noted(item, clone=clone) for key, item in value.items()}
    return value


def is_structure(name: str) -> bool:
    """Tell whether an attribute of an optimizer is one that torch gives every optimizer."""
    return name in ("param_groups", "state", "defaults") or _is_hooks(name)


def _is_hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


@final
class _Copier:
    """Copies what an optimizer holds, leaving parameters, modules and functions as they are."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._memo: dict[int, Any] = {
            id(param): param for group in optimizer.param_groups for param in group["params"]
        }

    def twin(self, optimizer: Optimizer) -> Optimizer:
        known = self._memo.get(id(optimizer))
        if known is not None:
            twin: Optimizer = known
            return twin
        twin = object.__new__(type(optimizer))
        self._memo[id(optimizer)] = twin
        for name, value in vars(optimizer).items():
            if name == "param_groups":
                value = [self._empty(group) for group in value]
            elif name == "state":
                value = defaultdict(dict, {k: self.copy(v) for k, v in value.items() if _plain(k)})
            elif _is_hooks(name):
                value = OrderedDict()  # hooks: torch looks for them on whatever it steps
            elif name == "step":
                continue  # what an LRScheduler puts there steps the original
            else:
                value = self.copy(value)
            vars(twin)[name] = value
        return twin

    def copy(self, value: Any) -> Any:  # noqa: ANN401 - any attribute
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, torch.optim.Optimizer):
            return self.twin(value)
        if isinstance(value, Tensor):
            return value.detach().clone()
        if type(value) in (list, tuple, set):
            return type(value)(self.copy(item) for item in value)
        if isinstance(value, dict) and type(value) in (dict, defaultdict):
            copied = copy.copy(value)
            copied.update({key: self.copy(item) for key, item in value.items()})
            return copied
        return value

    def _empty(self, group: dict[str, Any]) -> dict[str, Any]:
        known = self._memo.setdefault(
            id(group), {key: [] if key == "params" else self.copy(v) for key, v in group.items()}
        )
        result: dict[str, Any] = known
        return result


def _plain(key: object) -> bool:
    return not isinstance(key, Tensor)
