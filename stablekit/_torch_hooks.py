"""The only place that knows torch's optimizer hooks, and every way in which ``step`` is called.

Not a step: the call with which torch.distributed.checkpoint makes optimizers create their state,
and the inner call of a subclass that calls ``super().step()`` (torch hooks both). A step that
raises fires no post-hook, so whatever it left open is closed when the next one begins.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit._amp import is_fused
from stablekit._callers import is_checkpointing
from stablekit._rates import LentRates
from stablekit._withhold import Bookkeeping, Loan, Withheld, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from stablekit._pace import Pace
    from stablekit._round import Round

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def has_native_hooks(candidate: object) -> bool:
    """Tell whether torch's step hooks fire on this object.

    They do if its class was prepared, which the constructor of ``Optimizer`` does.
    """
    return (
        isinstance(candidate, torch.optim.Optimizer)
        and "_optimizer_step_pre_hooks" in vars(candidate)
        and getattr(type(candidate).step, "hooked", False)
    )


@final
class Wire:
    """The hooks of one session on one optimizer."""

    def __init__(self, pace: Pace, optimizer: Optimizer) -> None:
        """Register the step hooks."""
        self.pace = pace
        self.session = pace.session
        self.optimizer = optimizer
        self._depth = 0
        self._frame: FrameType | None = None
        self._loan = Loan(optimizer)
        self._rates: LentRates | None = None
        self._withheld: Withheld | None = None
        self._books: Bookkeeping | None = None
        self._ignored = False
        self._is_leaving = False
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def cut(self) -> None:
        """Remove the hooks and give back what is lent; within a step, when that step is over."""
        self._is_leaving = True
        if self._depth and _is_running(self._frame):
            return
        self._give_back()
        self._frame = None
        for handle in self._handles:
            handle.remove()

    def give_back(self) -> None:
        """Give back what a step that raised has left lent; nothing while a step is running."""
        if not (self._depth and _is_running(self._frame)):
            self._give_back()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> _Call | None:  # noqa: ANN401 - any call
        if optimizer is not self.optimizer:
            return None
        if self._depth and _is_running(self._frame):
            self._depth += 1
            return None
        self._give_back()
        self._frame, self._depth = sys._getframe(2), 1
        self._ignored = self.pace.is_paused or _is_phantom(optimizer, kwargs, self._frame)
        if self._ignored:
            return None
        where, closure = _closure(args, kwargs)
        if closure is None:
            moment = self.pace.begin(self.optimizer, frame=self._frame)
            return self._apply(moment, args, kwargs)
        call = _with_closure(args, kwargs, where, self._wrapped(closure))
        self._lend_rates()  # LBFGS reads its rate before it calls the closure
        return call

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401 - any call
        if optimizer is not self.optimizer:
            return
        self._depth -= 1
        if self._depth:
            return
        self._frame = None
        self._give_back()
        if self._is_leaving:
            self.cut()
        elif not self._ignored:
            self.pace.finish(self.optimizer)

    def _apply(self, moment: Round, args: Any, kwargs: Any) -> _Call | None:  # noqa: ANN401 - any call
        """Make this optimizer's own arithmetic follow what was decided for the step."""
        if moment.is_withheld:
            self._withheld = Withheld(self.optimizer)
            return (stand_in(self.optimizer), *args[1:]), kwargs
        self._lend(moment)
        return None

    def _lend(self, moment: Round) -> None:
        """Hand over lowered rates, and to a fused optimizer the loss scale and the skip flag."""
        self._lend_rates()
        if not is_fused(self.optimizer):
            return
        if moment.lent_scale is not moment.amp.scale:
            self._loan.set("grad_scale", moment.lent_scale)
        flag = moment.lent_found_inf
        if flag is not None:
            own: Tensor | None = getattr(self.optimizer, "found_inf", None)
            self._loan.set("found_inf", flag if own is None else torch.maximum(flag, own.view(())))

    def _lend_rates(self) -> None:
        factor = math.prod(self.session.lr_factors.values())
        if factor != 1 and self._rates is None and not self.session.dry_run:
            self._rates = LentRates(self.optimizer, factor)

    def _take_back_rates(self) -> None:
        if self._rates is not None:
            self._rates.give_back()
            self._rates = None

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that treats the gradients each time they have been made."""
        books = Bookkeeping(self.optimizer)
        evaluations = 0

        @functools.wraps(closure)
        def evaluate() -> Any:  # noqa: ANN401 - whatever the closure returns
            nonlocal evaluations
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                evaluations += 1
                if evaluations > 1:
                    self._again()
                    return loss
                if isinstance(loss, Tensor):
                    self.pace.saw_loss(loss)
                self._take_back_rates()  # hooks see, and may lend, the scheduler's
                moment = self.pace.begin(self.optimizer, by_hand=True)
                if moment.is_withheld:
                    books.hold()
                    self._withheld, self._books = Withheld(self.optimizer), books
                else:
                    self._lend(moment)
            return loss

        return evaluate

    def _again(self) -> None:
        self.pace.again()
        if self._withheld is not None:  # the step is skipped, whatever is evaluated now
            self._withheld.give_back()
            self._withheld = Withheld(self.optimizer)

    def _give_back(self) -> None:
        self._loan.give_back()
        if self._withheld is not None:
            self._withheld.give_back()
            self._withheld = None
        if self._books is not None:
            self._books.restore()
            self._books = None
        self._take_back_rates()


def _is_running(frame: FrameType | None) -> bool:
    """Tell whether a call is still on the stack; one that raised is not."""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def _is_phantom(optimizer: Optimizer, kwargs: dict[str, Any], frame: FrameType | None) -> bool:
    """Recognise torch.distributed.checkpoint making state: closure=None, no state, every lr 0.

    Behind Accelerate's wrapper this looks like the first step of a warm-up; then the caller tells.
    """
    if optimizer.state:
        return False
    if set(kwargs) != {"closure"} or kwargs["closure"] is not None:
        return is_checkpointing(frame)
    return all(float(group.get("lr", 1.0)) == 0.0 for group in optimizer.param_groups)


def _closure(args: Any, kwargs: Any) -> tuple[str, Callable[[], Any] | None]:  # noqa: ANN401 - any call
    if callable(kwargs.get("closure")):
        return "kwargs", kwargs["closure"]
    if len(args) > 1 and callable(args[1]):
        return "args", args[1]
    return "", None


def _with_closure(args: Any, kwargs: Any, where: str, closure: Callable[[], Any]) -> _Call:  # noqa: ANN401 - any call
    if where == "kwargs":
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
