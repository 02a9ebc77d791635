"""Closing what a plugin opened when nobody needs it any more, however that comes about."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def at_end_of(owner: object, close: Callable[[], object]) -> weakref.finalize[[], Any]:
    """Have ``close`` called when the owner is gone or the process ends, but not in forked children.

    A child would write the same rows again, or wait for threads that it does not have. Calling what
    is returned closes now, and not again later.
    """
    process = os.getpid()

    def close_here() -> None:
        if os.getpid() == process:
            close()

    return weakref.finalize(owner, close_here)
