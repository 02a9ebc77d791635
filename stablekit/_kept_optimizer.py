"""All that makes an optimizer go on as it would have: parameters, state, groups and counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit._keeping import Keeper, Returner
from stablekit._sharding import local
from stablekit._withhold import is_structure
from stablekit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stablekit._keeping import Kept, Spare

_OF_OTHERS = frozenset({"step", "grad_scale", "found_inf", "_opt_called"})
"""Attributes that schedulers and GradScalers set on optimizers for themselves."""


@final
class KeptOptimizer:
    """A copy of one optimizer, without those inside of it.

    Tensors and containers are copied. Objects of other kinds are kept as they are, so one that an
    optimizer changes in its state does not go back: of pytorch_optimizer, ScalableShampoo.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Keeper, spare: Spare) -> None:
        """Copy parameters (each rank its part), state, group entries and own attributes.

        Args:
            optimizer: what to copy.
            weights: keeps parameters, which several optimizers may hold.
            spare: memory to use first.
        """
        self.optimizer = optimizer
        groups = optimizer.param_groups
        params = [list(group["params"]) for group in groups]
        keeper = Keeper(spare, shared=[param for group in params for param in group])
        self._values = [[weights.keep(param) for param in group] for group in params]
        self._state = [
            [keeper.keep(optimizer.state.get(param)) for param in group] for group in params
        ]
        own = {id(param) for group in params for param in group}
        self._other_state = {
            key: keeper.keep(value) for key, value in optimizer.state.items() if id(key) not in own
        }
        self._entries = [
            {key: keeper.keep(value) for key, value in group.items() if key != "params"}
            for group in groups
        ]
        self._attributes = {
            key: keeper.keep(value) for key, value in _attributes(optimizer).items()
        }
        self.tensors: list[Kept] = keeper.tensors

    def refuse_others(self) -> None:
        """Make sure that the optimizer has the parameters it had, perhaps among others.

        Raises:
            StateError: One is missing or has another shape.
        """
        groups = self.optimizer.param_groups
        if len(groups) < len(self._values):
            raise StateError(
                f"the snapshot is of {len(self._values)} parameter groups, the"
                f" {type(self.optimizer).__name__} has {len(groups)} now"
            )
        for g, (kept, group) in enumerate(zip(self._values, groups, strict=False)):
            params = group["params"]
            if len(kept) != len(params) or not all(
                one.fits(param) for one, param in zip(kept, params, strict=True)
            ):
                raise StateError(
                    f"parameter group {g} of {type(self.optimizer).__name__} holds other parameters"
                    " than when the snapshot was taken"
                )

    def restore(self, *, with_lr: bool) -> None:
        """Put everything back; state that came into being since then disappears."""
        returner, optimizer = Returner(), self.optimizer
        groups = optimizer.param_groups[: len(self._values)]
        known = set()
        for group, values, states in zip(groups, self._values, self._state, strict=True):
            for param, value, state in zip(group["params"], values, states, strict=True):
                value.write_to(param)
                known.add(id(param))
                _set(optimizer.state, param, returner.put_back(state, optimizer.state.get(param)))
        self._forget_others(known)
        for key, value in self._other_state.items():
            optimizer.state[key] = returner.put_back(value, optimizer.state.get(key))
        for group, entries in zip(groups, self._entries, strict=True):
            _replace(group, entries, returner, keep={"params", *(() if with_lr else ("lr",))})
        _replace(vars(optimizer), self._attributes, returner, keep=_kept_names(optimizer))

    def _forget_others(self, known: set[int]) -> None:
        """Drop state under keys that are neither known nor parameters of a group added since."""
        added = {
            id(param)
            for group in self.optimizer.param_groups[len(self._values) :]
            for param in group["params"]
        }
        for key in list(self.optimizer.state):
            if id(key) not in known | added and key not in self._other_state:
                del self.optimizer.state[key]


def all_optimizers(
    optimizers: Iterable[torch.optim.Optimizer],
) -> Iterator[torch.optim.Optimizer]:
    """Yield optimizers and those they hold, such as the one inside Lookahead."""
    for optimizer in optimizers:
        yield optimizer
        inner = [one for one in vars(optimizer).values() if isinstance(one, torch.optim.Optimizer)]
        yield from all_optimizers(inner)


def is_finite(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return whether parameters, and state of their size, are finite here; 0-dim bool."""
    parts = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            values = state.values() if isinstance(state, dict) else ()
            moments = [v for v in values if isinstance(v, Tensor) and v.shape == param.shape]
            parts += [local(one.detach()) for one in (param, *moments)]
    home = parts[0].device if parts else torch.device("cpu")
    ends = [_extreme(part).to(home) for part in parts if part.is_floating_point() and part.numel()]
    return torch.stack(ends).isfinite().all() if ends else torch.ones((), dtype=torch.bool)


def _extreme(part: Tensor) -> Tensor:
    """Return a number that is not finite if any element is not; one pass, no memory."""
    low, high = torch.aminmax(part)
    return torch.maximum(high.float(), -low.float())


def _set(state: Any, param: Tensor, value: Any) -> None:  # noqa: ANN401 - any optimizer state
    if value is None:
        state.pop(param, None)
    else:
        state[param] = value


def _replace(
    current: dict[str, Any], kept: dict[str, Any], returner: Returner, *, keep: set[str]
) -> None:
    """Make a dictionary hold what was kept, but for the keys that are not ours."""
    for key in [key for key in current if key not in kept and key not in keep]:
        del current[key]
    for key, value in kept.items():
        if key not in keep:
            current[key] = returner.put_back(value, current.get(key))


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    foreign = _kept_names(optimizer)
    return {key: value for key, value in vars(optimizer).items() if key not in foreign}


def _kept_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the attributes that are no part of the optimizer's own progress."""
    return {
        key
        for key, value in vars(optimizer).items()
        if key in _OF_OTHERS or is_structure(key) or isinstance(value, torch.optim.Optimizer)
    }
