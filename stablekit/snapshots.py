"""Going back: the state of a run in CPU memory, and putting the run into that state again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, final

import torch

from stablekit import _kept_optimizer, _state
from stablekit._keeping import Keeper, Returner, Spare
from stablekit._kept_optimizer import KeptOptimizer, all_optimizers
from stablekit.errors import StateWarning

if TYPE_CHECKING:
    from stablekit._session import Session

__all__ = ["Snapshot", "is_finite"]


@final
class Snapshot:
    """What a run needs to go on from here once more: made by :meth:`take`.

    Taken and put back are, bit for bit: the parameters of the session's optimizers, their state,
    group entries and counters; the buffers of ``model=``; the statistics of the plugins and
    ``session.updates``; whatever ``session.track(...)`` was told of, such as schedulers. Not put
    back: ``session.number``, the counts of skipped and clipped steps and the events, which say what
    happened; random number generators and data loaders, so that what comes next is not the same
    again. A plugin with a method ``go_back(state)`` has that called instead of ``load_state_dict``:
    one that writes a log does nothing there.

    Every rank copies the part of sharded tensors that it holds, and takes part in no collective.
    Memory is that of the copies (:attr:`nbytes`): with AdamW in float32, 12 bytes a parameter.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
        >>> session = stablekit.attach(optimizer)
        >>> snapshot = Snapshot.take(session)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p.data, len(optimizer.state)
        (tensor([0., 0.]), 1)
        >>> snapshot.restore()
        >>> p.data, len(optimizer.state)
        (tensor([1., 1.]), 0)
    """

    def __init__(self, session: Session, spare: Spare) -> None:
        """Copy everything; use :meth:`take`."""
        self.session = session
        self.number = session.number
        """Steps taken so far, as ``session.number``."""
        self.updates = session.updates
        """Updates applied so far, as ``session.updates``."""
        self._loads = session.loads
        weights, buffers = Keeper(spare), Keeper(spare)
        optimizers = list(all_optimizers(session.optimizers))
        self._optimizers = [KeptOptimizer(one, weights, spare) for one in optimizers]
        named = dict(session.model.named_buffers()) if session.model is not None else {}
        self._buffers = {name: buffers.keep(buffer) for name, buffer in named.items()}
        self._plugins = {name: _state.state_of(one) for name, one in session.plugins.items()}
        tracked = Keeper(spare, deep=True)
        self._tracked = {n: tracked.keep(one.state_dict()) for n, one in session.tracked.items()}
        self._kept = weights.tensors + buffers.tensors + tracked.tensors
        self._kept += [kept for one in self._optimizers for kept in one.tensors]

    @classmethod
    @torch.no_grad()
    def take(cls, session: Session, *, reuse: Snapshot | None = None) -> Snapshot:
        """Return a snapshot of a session between two steps.

        Args:
            session: of what.
            reuse: an older snapshot to write over, which saves most of the time. It cannot be
                restored any more.
        """
        session.mail.collect()
        session.give_back()
        spare = Spare() if reuse is None else reuse._give_up()
        return cls(session, spare)

    @property
    def nbytes(self) -> int:
        """How much memory the copies take, in bytes."""
        return sum(kept.data.nbytes for kept in self._kept)

    @property
    def is_stale(self) -> bool:
        """Whether the session continues from a checkpoint that was loaded since."""
        return self._loads != self.session.loads

    @torch.no_grad()
    def restore(self) -> None:
        """Put the run back into this state, in place: all tensors stay the same objects.

        Learning rates stay as they are, with a warning, if a scheduler steps an optimizer and none
        is tracked: schedulers that go on from the current rate would go on from a wrong one.

        Raises:
            StateError: The optimizers do not hold the parameters they held; nothing was changed.
            RuntimeError: The snapshot was reused.
        """
        if not self._optimizers:
            raise RuntimeError("this snapshot was written over by a later one")
        session = self.session
        session.mail.collect()
        session.give_back()
        for one in self._optimizers:
            one.refuse_others()
        with_lr = not _has_unknown_scheduler(session)
        for one in self._optimizers:
            one.restore(with_lr=with_lr)
        self._restore_buffers()
        session.updates = self.updates
        for name, state in self._plugins.items():
            if name in session.plugins:
                _state.go_back(session.plugins[name], state)
        for name, kept in self._tracked.items():
            if name in session.tracked:
                session.tracked[name].load_state_dict(Returner(deep=True).put_back(kept))

    def _restore_buffers(self) -> None:
        model, returner = self.session.model, Returner()
        for name, kept in self._buffers.items():
            assert model is not None
            owner, _, last = name.rpartition(".")
            buffers = model.get_submodule(owner)._buffers
            buffers[last] = returner.put_back(kept, buffers.get(last))

    def _give_up(self) -> Spare:
        spare = Spare(self._kept)
        self._optimizers, self._buffers, self._kept = [], {}, []
        return spare


@torch.no_grad()
def is_finite(session: Session) -> bool:
    """Tell whether parameters and optimizer state are finite, on all ranks.

    One read of them and, where there are several processes, one reduction; every rank must ask.

    Example:
        >>> import torch, stablekit
        >>> is_finite(stablekit.attach(torch.optim.SGD([torch.tensor([float("nan")])])))
        False
    """
    flags = [_kept_optimizer.is_finite(one) for one in all_optimizers(session.optimizers)]
    home = session.current_layout()[0].device
    is_bad = torch.stack([~flag.to(home) for flag in flags]).any().float()
    return not bool(session.reduce(is_bad, "max"))


def _has_unknown_scheduler(session: Session) -> bool:
    """Tell whether an optimizer is stepped by a scheduler that nobody told the session of."""
    is_scheduled = any(
        hasattr(vars(one).get("step"), "_wrapped_by_lr_sched") for one in session.optimizers
    )
    if not is_scheduled or any(hasattr(one, "get_last_lr") for one in session.tracked.values()):
        return False
    warnings.warn(
        "a learning rate scheduler steps this optimizer, but is not tracked, so the learning rate"
        " stays where it is; call session.track(scheduler=...) to have it go back too",
        StateWarning,
        stacklevel=4,
    )
    return True
