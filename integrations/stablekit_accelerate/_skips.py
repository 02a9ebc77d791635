"""``optimizer_step_was_skipped``, made to tell of every step that did not update.

Accelerate asks whether the optimizer was called. A fused one always is and skips in its kernel
(accelerate#4242), and a step that a plugin skips is a call too. There is no public way to say so:
what is written here are private attributes of ``AcceleratedOptimizer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from stablekit.hookspecs import hooks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from stablekit import Session, Step


@final
class SkipFlags:
    """The flags of the prepared optimizers that are in a session."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Find them when they are needed: the optimizer may not be prepared yet."""
        self.accelerator = accelerator

    def tell(self, step: Step) -> None:
        """Set the flags of a step; on an accelerator they stay there until somebody looks."""
        if step.session.dry_run or not self._may_skip(step.session):
            return
        ok = bool(step.ok) if step.session.host else step.ok
        for wrapper in self._wrappers(step.session):
            if getattr(wrapper, "_accelerate_step_called", False):  # it asks when we return
                wrapper._accelerate_step_called = ok
            else:
                wrapper._is_overflow = not ok if isinstance(ok, bool) else ~ok

    def clear(self, session: Session) -> None:
        """Say of no step that it was skipped, as Accelerate does in the beginning."""
        for wrapper in self._wrappers(session):
            wrapper._is_overflow = False

    def _may_skip(self, session: Session) -> bool:
        observers = ("observe_gradients" in hooks_of(plugin) for plugin in session.plugins.values())
        return self.accelerator.scaler is not None or any(observers)

    def _wrappers(self, session: Session) -> Iterator[AcceleratedOptimizer]:
        for wrapper in self.accelerator._optimizers:
            inner = wrapper
            while hasattr(inner, "optimizer") and not any(inner is o for o in session.optimizers):
                inner = inner.optimizer
            if any(inner is one for one in session.optimizers):
                yield wrapper
