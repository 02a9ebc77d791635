"""What must be the same on all ranks that step together, compared once before the first step.

Ranks meet in the store of the process group, not in a collective: one that never comes is a
time-out with a sentence instead of a hang, and what differs can be told in words.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch.distributed as dist

from stablekit._sharding import world_size
from stablekit._state import settings
from stablekit.errors import AttachError, StablekitWarning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.distributed_c10d import Store

    from stablekit._layout import Layout
    from stablekit._session import Session

SECONDS = 120.0
"""How long to wait for ranks that do not come, where norms are shared with them."""

SECONDS_ALONE = 10.0
"""Likewise where nothing is, so that a session on some ranks only is not held up for long."""

_NAMED = 8
_DIGITS = 16
_PLACES = ("path", "dir", "file", "folder")


def agree(session: Session, layout: Layout) -> bool:
    """Make sure that ranks which share numbers attached the same; tell whether any has a loss.

    Raises:
        AttachError: They did not, or some never came.
    """
    if world_size() == 1 or dist.get_backend() == "fake":
        return bool(session.hearing)
    sharing = layout.ranks | session.reduce_groups.ranks or frozenset(range(world_size()))
    is_whole = not layout.ranks and not session.reduce_groups
    meeting = _Meeting(dist.distributed_c10d._get_default_store())
    meeting.come(facts_of(session, layout), has_loss=bool(session.hearing))
    seconds = SECONDS_ALONE if is_whole else SECONDS
    missing = meeting.wait(seconds)
    if missing:
        is_fatal = not is_whole and not sharing.isdisjoint(missing)
        _report_missing(missing, seconds, is_fatal=is_fatal)
    if meeting.all_alike:
        return meeting.someone_has_a_loss
    differences, strangers = meeting.differences(sharing)
    if not missing:
        meeting.leave()
    if differences:
        raise AttachError(
            "ranks that train together attached different things, so they would wait for one"
            f" another or drift apart. {'; '.join(differences)}. Attach the same on each of them"
            f"{_HINT if any('parameters' in one for one in differences) else ''}"
        )
    if strangers:
        warnings.warn(
            f"{_listed(strangers)} attached something else. No norm is shared with them: if they"
            " train stages of the same model, give reduce_groups=. A plugin that reads step.loss or"
            " reduces waits for all ranks",
            StablekitWarning,
            stacklevel=2,
        )
    return meeting.someone_has_a_loss


_HINT = "; the stages of a pipeline need reduce_groups="


def facts_of(session: Session, layout: Layout) -> dict[str, str]:
    """Return what must agree, in words.

    Parameters may differ between stages of a pipeline, which have ``reduce_groups``.
    """
    facts = {
        "plugins": " + ".join(session.plugins) or "none",
        "log_every": str(session.log_every),
        "dry_run": str(session.dry_run),
        "device_mode": str(not session.host),
        "reduce_groups": " + ".join(session.reduce_groups.patterns) or "none",
        "optimizers": " + ".join(type(one).__name__ for one in session.optimizers),
    }
    for name, plugin in session.plugins.items():
        facts[f"{name} is a"] = type(plugin).__name__
        facts.update((f"{name}.{key}", repr(value)) for key, value in _shared_settings(plugin))
    facts.update((f"{name} sees", what) for name, what in session.seats.restrictions())
    if not session.reduce_groups:
        shapes = [tuple(param.shape) for param in session.current_layout()[1]]
        facts["number of parameters"] = str(len(shapes))
        facts["shapes of parameters"] = _abridged(shapes)
        facts["names of parameters"] = _abridged(layout.names)
    return facts


@final
class _Meeting:
    """Ranks that leave what they are in the store and wait until all have."""

    def __init__(self, store: Store) -> None:
        """Number the meeting: every session has one, in the order of their first steps."""
        self._store = store
        self._rank = dist.get_rank()
        number = store.add(f"stablekit/{self._rank}", 1)
        self._room = f"stablekit/meeting/{number}"

    def come(self, facts: dict[str, str], *, has_loss: bool) -> None:
        """Sign in under the facts; the first of a kind writes them down."""
        store, room, told = self._store, self._room, json.dumps(facts)
        kind = _digest(told)
        place = store.add(f"{room}/{kind}", 1)
        store.set(f"{room}/{kind}/{place}", str(self._rank))
        if place == 1:
            store.set(f"{room}/kind/{store.add(f'{room}/kinds', 1)}", f"{kind}{told}")
        if has_loss:
            store.add(f"{room}/losses", 1)
        store.set(f"{room}/rank/{self._rank}", "here")
        if store.add(f"{room}/arrived", 1) == world_size():
            store.set(f"{room}/complete", "yes")

    def wait(self, seconds: float) -> list[int]:
        """Wait so long for all ranks; return those that did not come."""
        store, room = self._store, self._room
        try:
            store.wait([f"{room}/complete"], timedelta(seconds=seconds))
        except RuntimeError:
            # A time-out; a store that is broken raises again here.
            ranks = range(world_size())
            return [rank for rank in ranks if not store.check([f"{room}/rank/{rank}"])]
        return []

    @property
    def someone_has_a_loss(self) -> bool:
        """Whether any rank observed a loss before its first step."""
        return bool(self._store.add(f"{self._room}/losses", 0))

    @property
    def all_alike(self) -> bool:
        """Whether all who came are of one kind."""
        return self._store.add(f"{self._room}/kinds", 0) == 1

    def differences(self, sharing: frozenset[int]) -> tuple[list[str], list[int]]:
        """Return what differs between the ranks that share numbers, and who else differs."""
        store, room = self._store, self._room
        count = store.add(f"{room}/kinds", 0)
        kinds = [store.get(f"{room}/kind/{i + 1}").decode() for i in range(count)]
        told = [(self._ranks_of(kind[:_DIGITS]), json.loads(kind[_DIGITS:])) for kind in kinds]
        told.sort(key=lambda one: one[0])
        ours = [(sorted(sharing.intersection(ranks)), facts) for ranks, facts in told]
        ours = [(ranks, facts) for ranks, facts in ours if ranks]
        strangers = [rank for ranks, _ in told for rank in ranks if sharing.isdisjoint(ranks)]
        differences = _differences([(_listed(ranks), facts) for ranks, facts in ours])
        return list(differences), sorted(strangers)

    def leave(self) -> None:
        """Wait for the others to have read too: the store may end with the rank that keeps it."""
        if self._store.add(f"{self._room}/left", 1) == world_size():
            self._store.set(f"{self._room}/empty", "yes")
        self._store.wait([f"{self._room}/empty"], timedelta(seconds=SECONDS))

    def _ranks_of(self, kind: str) -> list[int]:
        store, room = self._store, self._room
        count = store.add(f"{room}/{kind}", 0)
        return sorted(int(store.get(f"{room}/{kind}/{i + 1}")) for i in range(count))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _abridged(values: Sequence[object]) -> str:
    """Return the first value and a digest of all."""
    first = "".join(map(str, values[:1]))
    return f"{first}, ... (digest {_digest(str(list(values)))})"


def _shared_settings(plugin: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any plugin
    """Yield settings but for places to write to, of which each rank may have its own."""
    for key, value in settings(plugin).items():
        if not key.endswith(_PLACES):
            yield key, value


def _differences(told: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    known = dict.fromkeys(key for _, facts in told for key in facts)
    common = [key for key in known if all(key in facts for _, facts in told)]
    for key in common:
        if len({facts[key] for _, facts in told}) > 1:
            values: dict[str, list[str]] = {}
            for ranks, facts in told:
                values.setdefault(facts[key], []).append(ranks)
            yield f"{key}: " + ", ".join(f"{v} on {' and '.join(r)}" for v, r in values.items())


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED])) + (", ..." if len(ranks) > _NAMED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _report_missing(missing: list[int], seconds: float, *, is_fatal: bool) -> None:
    who = (
        f"{_listed(missing)} of {world_size()} did not reach the first step of this session within"
        f" {seconds:.0f} s"
    )
    if is_fatal:
        raise AttachError(
            f"{who}, but share its gradient norms: attach the same plugins on every rank, and step"
            " on every rank"
        )
    warnings.warn(
        f"{who}. If they train the same model, attach the same plugins there: otherwise what"
        " plugins do here makes the copies drift apart",
        StablekitWarning,
        stacklevel=3,
    )
