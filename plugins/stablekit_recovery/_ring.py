"""The latest snapshots of a run, and which of them to go back to."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from stablekit.snapshots import Snapshot

if TYPE_CHECKING:
    from stablekit import Session


@final
class Ring:
    """At most so many snapshots, oldest first, in memory that is used over and over."""

    def __init__(self, keep: int) -> None:
        """Start without snapshots."""
        self.keep = keep
        self._held: list[Snapshot] = []
        self._unused: list[Snapshot] = []
        self._returned_to: Snapshot | None = None

    def __len__(self) -> int:
        """Return how many snapshots there are."""
        return len(self._held)

    @property
    def oldest(self) -> Snapshot:
        """The oldest snapshot; there must be one."""
        return self._held[0]

    @property
    def newest(self) -> Snapshot:
        """The newest snapshot; there must be one."""
        return self._held[-1]

    @property
    def nbytes(self) -> int:
        """How much memory the snapshots take, in bytes."""
        return sum(one.nbytes for one in (*self._held, *self._unused))

    def take(self, session: Session) -> None:
        """Take a snapshot, in place of the oldest if there are as many as are kept."""
        if len(self._held) == self.keep:
            self._unused.append(self._held.pop(0))
        reuse = self._unused.pop() if self._unused else None
        self._held.append(Snapshot.take(session, reuse=reuse))

    def drop_stale(self) -> None:
        """Drop the snapshots of a run that was given up for a loaded checkpoint."""
        self._unused += [one for one in self._held if one.is_stale]
        self._held = [one for one in self._held if not one.is_stale]

    def choose(self, before: int) -> Snapshot:
        """Return the newest snapshot of a step not after this one, else the oldest there is.

        A snapshot that was returned to, and led into trouble again, gives way to an older one.
        Those that are newer than the one returned are dropped.
        """
        if len(self._held) > 1 and self.newest is self._returned_to:
            self._unused.append(self._held.pop())
        while len(self._held) > 1 and self.newest.number > before:
            self._unused.append(self._held.pop())
        self._returned_to = self.newest
        return self.newest

    def clear(self) -> None:
        """Let all memory go."""
        self._held, self._unused, self._returned_to = [], [], None
