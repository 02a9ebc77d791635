"""Attaching sessions to the optimizers of a Trainer, with the state a checkpoint had for them."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import stablekit
from stablekit.errors import StateError, StateWarning
from stablekit_lightning._refusals import refuse_second_clip, refuse_unclear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup

    from stablekit import Session


class Options(NamedTuple):
    """What the callback was given: ``together``, and arguments of :func:`stablekit.attach`."""

    plugins: Sequence[Any]
    together: bool | None
    log_every: int | None
    device_mode: bool | None
    reduce_groups: Sequence[ProcessGroup] | None
    dry_run: bool


def attach_all(
    trainer: Trainer, module: LightningModule, options: Options, *, restored: bool
) -> list[Session]:
    """Return one session for all optimizers if they step together, otherwise one for each.

    Args:
        trainer: its optimizers are attached to.
        module: names the parameters.
        options: what to attach, and how.
        restored: whether :func:`restore_all` will be called with the state of a checkpoint.

    Raises:
        AttachError: The module, the Trainer and the plugins do not fit together.
    """
    optimizers, plugins, together = trainer.optimizers, options.plugins, options.together
    refuse_unclear(len(optimizers), plugins, together=together)
    sessions: list[Session] = []
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        if restored:  # optimizers have state already; that of the plugins is to follow
            warnings.simplefilter("ignore", StateWarning)
        for group in [optimizers] if together else [[one] for one in optimizers]:
            session = stablekit.attach(
                group,
                *plugins,
                model=module,
                log_every=options.log_every,
                device_mode=options.device_mode,
                reduce_groups=options.reduce_groups,
                dry_run=options.dry_run,
            )
            undo.callback(session.detach)
            sessions.append(session)
        refuse_second_clip(trainer, sessions)
        undo.pop_all()
    return sessions


def restore_all(sessions: Sequence[Session], states: Sequence[Mapping[str, Any]]) -> None:
    """Let sessions continue from what a checkpoint has of them.

    Raises:
        StateError: It has another number of sessions, or one of the states is malformed.
    """
    if len(states) != len(sessions):
        raise StateError(f"{len(states)} sessions were saved, the module now has {len(sessions)}")
    for session, state in zip(sessions, states, strict=True):
        session.load_state_dict(state, strict=False)


def detach_all(sessions: Sequence[Session]) -> None:
    """Detach every session; what happened can still be read from them."""
    for session in sessions:
        session.detach()
