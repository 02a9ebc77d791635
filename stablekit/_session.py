"""A session: plugins attached to an optimizer, with their metrics, events and state."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from stablekit import _state
from stablekit._callers import takes_apart
from stablekit._hearing import Ear, Hearing
from stablekit._late import warn_of_late
from stablekit._layout import Layout, layout_of, parameters_of
from stablekit._mail import Mail
from stablekit._metrics import Metrics
from stablekit._pace import Pace
from stablekit._sharding import all_reduce
from stablekit._summary import summarize
from stablekit._torch_hooks import Wire
from stablekit.arguments import number
from stablekit.errors import NoEffectWarning, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from stablekit._reduce_groups import ReduceGroups
    from stablekit._round import Round
    from stablekit._seats import Seats
    from stablekit.events import Event
    from stablekit.hookspecs import Plugin
    from stablekit.step import Step

MAX_EVENTS = 1000


@final
class Session:
    """Plugins at work on an optimizer; made by :func:`stablekit.attach`.

    Example:
        >>> import torch, stablekit
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with stablekit.attach(optimizer, "global-norm") as session:
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> round(session.metrics()["grad_norm_clipped"], 3)
        1.0
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        seats: Seats,
        *,
        model: nn.Module | None,
        log_every: int | None,
        device_mode: bool | None,
        reduce_groups: ReduceGroups,
        dry_run: bool,
    ) -> None:
        """Wire the plugins to the optimizers; use :func:`stablekit.attach`."""
        self.optimizers = tuple(optimizers)
        self.seats = seats
        self.model = model
        self.dry_run = dry_run
        self.reduce_groups = reduce_groups
        self.expects_loss = False
        self.number = 0
        self.updates = 0
        self.skipped = 0
        self.is_paused = False
        self.awaits_state = False
        self.latest = Metrics()
        self._layout: Layout | None = None
        self._identity: tuple[int, ...] = ()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.hearing = Hearing(self.optimizers)
        self._batch: Any = None
        self._warned_of_late = False
        self._restored_at = -1
        self._tracked: dict[str, Any] = {}
        self.loads = 0
        self._lr_factors: dict[str, float] = {}
        self._when_idle: list[Callable[[], None]] = []
        self._to_tell: deque[tuple[Event, Step]] = deque()
        layout, _ = self.current_layout()
        on_host = layout.device.type == "cpu"
        self.host = on_host if device_mode is None else not device_mode
        self.log_every = (1 if on_host else 10) if log_every is None else log_every
        self.mail = Mail(host=self.host)
        self._pace = Pace(self)
        self._wires: list[Wire] = []
        self._handles: list[RemovableHandle] = []
        self.seats.settle(layout)
        try:
            self._wire_up()
        except BaseException:
            self._cut()
            raise

    def _wire_up(self) -> None:
        if self.model is not None:
            self._check_model(self.model)
            self._handles.append(self.model.register_forward_hook(Ear(self)))
        self._wires = [Wire(self._pace, optimizer) for optimizer in self.optimizers]
        self._handles += _state.register(self)
        self.seats.attached(self)

    def _cut(self) -> None:
        for wire in self._wires:
            wire.cut()
        for handle in self._handles:
            handle.remove()
        self._wires, self._handles = [], []
        self._batch = None

    @property
    def plugins(self) -> dict[str, Plugin]:
        """The attached plugins by name, in the listed order."""
        return self.seats.by_name

    @property
    def events(self) -> list[Event]:
        """The latest events, oldest first, at most 1000."""
        return list(self._events)

    @property
    def batch(self) -> Any:  # noqa: ANN401 - whatever the training loop observed
        """What was last passed to ``observe(batch=...)``."""
        return self._batch

    def observe(self, *, loss: Tensor | float | None = None, batch: Any = None) -> None:  # noqa: ANN401 - any batch description
        """Tell the session about the step to come; call it before ``step()``, any number of times.

        Args:
            loss: the loss of a micro-batch, a scalar; ``step.loss`` is their mean.
            batch: anything that identifies the batch, for events.

        Raises:
            ValueError: The loss is not a scalar.
        """
        if self.is_paused:
            return
        if loss is not None:
            self.hearing.observe(loss)
        if batch is not None:
            self._batch = batch

    def track(self, **objects: Any) -> None:  # noqa: ANN401 - anything with a state_dict
        """Name objects whose state belongs to the run, so that snapshots take it along.

        Schedulers, a GradScaler, an averaged copy of the model. What is tracked goes back when the
        run does (:class:`stablekit.snapshots.Snapshot`), so leave out a data loader that is to go
        on with other batches. Checkpoints are not concerned. A name given again is replaced.

        Raises:
            TypeError: An object lacks ``state_dict`` or ``load_state_dict``.

        Example:
            >>> import torch, stablekit
            >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
            >>> session = stablekit.attach(optimizer)
            >>> session.track(scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
            >>> list(session.tracked)
            ['scheduler']
        """
        for name, one in objects.items():
            for method in ("state_dict", "load_state_dict"):
                if not callable(getattr(one, method, None)):
                    raise TypeError(f"{name} is a {type(one).__name__}, which has no {method}()")
        self._tracked.update(objects)

    @property
    def tracked(self) -> dict[str, Any]:
        """What :meth:`track` was told, by name."""
        return dict(self._tracked)

    def scale_lr(self, factor: float, *, by: str) -> None:
        """Multiply all learning rates by a factor while the optimizers step, until told otherwise.

        The rates are given back as soon as an optimizer has stepped, so that neither schedulers nor
        checkpoints see the factor. Factors of several plugins multiply. A step that is in its
        ``observe_gradients`` takes the new factor already, but for an optimizer such as LBFGS,
        which reads its rate before anything else.

        Args:
            factor: above 0; 1 ends it.
            by: name of the plugin.

        Raises:
            TypeError: The factor is not a number.
            ValueError: It is not finite or not above 0.
        """
        self._lr_factors[by] = number("factor", factor, above=0)

    @property
    def lr_factors(self) -> dict[str, float]:
        """What learning rates are multiplied by in a step, by plugin."""
        return dict(self._lr_factors)

    def when_idle(self, call: Callable[[], None]) -> None:
        """Have a function called when the step is over, after all ``on_step_end``.

        For what replaces the state of everyone, which none of them may still be working on. In
        device mode the events of the step have arrived by then if it is one of every ``log_every``.
        """
        self._when_idle.append(call)

    def give_back(self) -> None:
        """Give back what a step that raised has left changed in the optimizers."""
        for wire in self._wires:
            wire.give_back()

    def metrics(self) -> dict[str, float]:
        """Return the latest metrics as plain floats; reads the device once."""
        self.mail.collect()
        self.latest.record("steps_skipped", self.skipped)
        return self.latest.read()

    def summary(self) -> str:
        """Return a table of what the plugins did so far.

        Example:
            >>> import torch, stablekit
            >>> layer = torch.nn.Linear(2, 2)
            >>> session = stablekit.attach(torch.optim.SGD(layer.parameters()), "zclip")
            >>> print(session.summary())
            0 steps, 0 updates, 0 skipped, 0 events
            plugin  steps clipped  threshold
            zclip   0 (0.0%)       -
        """
        self.mail.collect()
        return summarize(self)

    def reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Return a tensor reduced over all ranks with "sum", "mean", "max" or "min".

        The only way for a plugin to communicate. Without several processes it returns its input.

        Raises:
            ValueError: The operation is not known.
        """
        return all_reduce(tensor, op)

    def state_dict(self) -> dict[str, Any]:
        """Return all that must travel in a checkpoint: plain values and CPU tensors only.

        Raises:
            StateError: torch.distributed.checkpoint was given the session itself.
        """
        if takes_apart(sys._getframe(1)):
            raise StateError(
                "torch.distributed.checkpoint cannot load a session piece by piece; give it"
                " stablekit.checkpoint.SessionState(session)"
            )
        self.mail.collect()
        return _state.dump(self)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: the state; nothing changes if it is malformed.
            strict: refuse a state of other plugins instead of warning.

        Raises:
            StateError: A field is missing, unknown or of the wrong kind; the message names it.
        """
        _state.load(self, state, strict=strict)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let steps pass unseen and unchanged within a ``with`` block."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def detach(self) -> None:
        """Leave the optimizer exactly as it was; a second call does nothing."""
        if not self._wires:
            return
        try:
            self.mail.collect()
        finally:
            self._cut()
            self.seats.detached(self)

    def __repr__(self) -> str:
        """Show the optimizers and the plugins."""
        optimizers = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return f"Session({optimizers}; {', '.join(self.plugins) or 'no plugin'})"

    def __enter__(self) -> Session:
        """Return the session; leaving the block detaches it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def current_layout(self) -> tuple[Layout, list[Tensor]]:
        """Return the parameters the optimizers hold now; FSDP2 may have swapped them."""
        params = parameters_of(self.optimizers)
        groups = [len(group["params"]) for one in self.optimizers for group in one.param_groups]
        identity = (*map(id, params), *map(Tensor.numel, params), *groups)
        if self._layout is None or identity != self._identity:
            self._layout = layout_of(self.optimizers, self.model)
            self._identity = identity
        return self._layout, params

    @property
    def is_restored(self) -> bool:
        """Whether a state was loaded since the last step."""
        return self._restored_at == self.number

    def count_step(self) -> None:
        """Number a step; nothing that is still awaited for the plugins will come now."""
        if self.awaits_state:
            self.awaits_state = False
            _state.warn_of_missing(stacklevel=8)
        if self.number == 0 and self.model is not None and not self._warned_of_late:
            warn_of_late(self.model, parameters_of(self.optimizers), stacklevel=8)
        self.number += 1

    def count_skip(self) -> None:
        """Count a skipped step."""
        self.skipped += 1

    def publish(self, event: Event, step: Step) -> None:
        """Keep an event and tell the plugins; what they emit meanwhile comes after it."""
        self._events.append(event)
        self._to_tell.append((event, step))
        if len(self._to_tell) > 1:
            return
        try:
            while self._to_tell:
                self.seats.event(*self._to_tell[0])
                self._to_tell.popleft()
        finally:
            self._to_tell.clear()

    def close(self, moment: Round) -> None:
        """End a step: count it, fire the last hooks, hand out metrics."""
        if not moment.skipped:
            self.updates += 1
        moment.end()
        self._batch = None
        is_due = self.log_every and self.number % self.log_every == 0
        if is_due or self.mail.is_full:
            self.mail.collect()
        waiting, self._when_idle = self._when_idle, []
        for call in waiting:
            call()
        if is_due and self.seats.has("on_metrics"):
            self.seats.metrics(self.number, self.metrics())

    def restore(self, counters: Mapping[str, Any], events: list[Event]) -> None:
        """Continue from saved counters and events."""
        self.number = counters["number"]
        self.updates = counters["updates"]
        self.skipped = counters["skipped"]
        self.latest.restore_clipped(counters["clipped"])
        self._events.clear()
        self._events.extend(events)
        self._restored_at, self.awaits_state = self.number, False
        self.loads += 1

    def _check_model(self, model: nn.Module) -> None:
        names = {id(param) for param in model.parameters()}
        params = parameters_of(self.optimizers)
        self._warned_of_late = warn_of_late(model, params, stacklevel=5)
        if params and names.isdisjoint(map(id, params)):
            warnings.warn(
                f"none of the optimizer's {len(params)} parameters is in the model given"
                f" ({type(model).__name__}), so they have no names; is it the model this optimizer"
                " was made from?",
                NoEffectWarning,
                stacklevel=4,
            )
