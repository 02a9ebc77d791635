"""The hooks a plugin may implement and the moment at which each of them fires.

One call of ``optimizer.step()``, written as the program it is::

    session.on_attach                                   once, when the session is attached

    def step():                                         # the native pre-hook of torch
        observe_gradients(step)                         # read only; may call step.skip(...)
        if skipped:                                     # the optimizer sees no gradient at all
            on_skip(step)
        else:
            transform_gradients(step)                   # clippers, in the listed order
            commit()                                    # one write pass at most, often none
            before_update(step)                         # may edit the optimizer's state
        optimizer's own arithmetic
        if not skipped:                                 # the native post-hook of torch
            after_update(step)                          # projections, in the listed order
        on_step_end(step)                               # read only; metrics are complete
        if number % log_every == 0:
            on_metrics(number, metrics)                 # plain floats

    on_event(event, step)                               whenever something is emitted
    session.on_detach                                   once, when the session is detached

Rules:

* Hooks run in the order in which the plugins were listed.
* A hook nobody implements costs nothing; a hook that does not exist is an error at attach.
* In *host mode* (CPU) decisions are Python values. In *device mode* no hook may read a tensor on
  the host: a skipped step still runs ``transform_gradients``, with ``step.ok`` false on the device,
  and ``on_skip`` and ``on_event`` arrive at the next host read, at most ``log_every`` steps late.
* Statistics move only where ``step.learning`` is true: never in a skipped step, and only at the
  first evaluation of a closure.
* An implementation may take any subset of a hook's arguments.

Example:
    >>> import stablekit
    >>> class LargestNorm:
    ...     name = "largest-norm"
    ...
    ...     @stablekit.hookimpl
    ...     def observe_gradients(self, step):
    ...         step.record("value", step.gradients.raw_norms().max())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from stablekit._session import Session
    from stablekit.events import Event
    from stablekit.step import Step

__all__ = ["HOOKS", "Plugin", "hookimpl", "hooks_of", "hookspec"]

hookspec = pluggy.HookspecMarker("stablekit")
hookimpl = pluggy.HookimplMarker("stablekit")


@runtime_checkable
class Plugin(Protocol):
    """What every plugin has: a name. Everything else is optional.

    Optional are the hooks below; ``state_dict()`` / ``load_state_dict(state)`` for what must travel
    in a checkpoint (plain numbers, strings, lists and CPU tensors, under the same keys at all
    times); ``go_back(state)``, called instead of ``load_state_dict`` where the run returns to a
    snapshot in which the plugin had this state; a tuple ``needs`` naming what the plugin uses
    beyond norms and loss; a string ``cost`` for the catalogue; and a class method ``example()``
    that returns an instance for the conformance checks where the constructor has required
    arguments.

    ``needs`` lists any of

    * ``"unit_norms"``, ``"weight_unit_norms"``: announced, they are read for all plugins in one
      sweep, and reduced together with the norms;
    * ``"amaxes"``: the largest element of each tensor;
    * ``"elements"``: gradients element by element, through ``edit()``;
    * ``"parameters"``: weights or optimizer state, read or written;
    * ``"model"``: what its modules compute, through hooks of their own;
    * ``"loss"``: the loss or the logits, which it changes. That concerns all parameters, so that
      the plugin cannot be restricted to some with ``only``.

    The last five cause no read: they tell tools such as ``stablekit replay`` that a record of
    norms and losses does not say what the plugin would have done. It may be an attribute of the
    instance where it depends on the arguments.
    """

    name: str
    """Unique within a session; prefix of the plugin's metrics."""


@hookspec
def on_attach(session: Session) -> None:
    """Fire once, when the plugin's session has been attached to its optimizer.

    If it raises, nothing is attached: it and the plugins listed before it get ``on_detach``, which
    must stand an ``on_attach`` that did not come to its end.
    """


@hookspec
def observe_gradients(step: Step) -> None:
    """Look at the raw, unscaled gradients before anything changes them.

    Read only. The one moment at which ``step.skip(...)`` is legal.
    """


@hookspec
def on_skip(step: Step) -> None:
    """Fire when the step is skipped: no parameter moves, no statistic may move."""


@hookspec
def transform_gradients(step: Step) -> None:
    """Change the gradients through ``step.gradients``.

    In a closure that the optimizer evaluates several times this fires at every evaluation;
    ``step.evaluation`` counts them from 0. Later evaluations apply the thresholds of the first.
    """


@hookspec
def before_update(step: Step) -> None:
    """See the gradients as the optimizer will; may edit the optimizer's state."""


@hookspec
def after_update(step: Step) -> None:
    """Act on the parameters after they moved: projections and constraints."""


@hookspec
def on_step_end(step: Step) -> None:
    """Read what the step did; fires for skipped steps too."""


@hookspec
def on_event(event: Event, step: Step) -> None:
    """Hear of everything that is emitted, by the session or by any plugin."""


@hookspec
def on_metrics(number: int, metrics: Mapping[str, float]) -> None:
    """Receive the metrics as plain floats, every ``log_every`` steps."""


@hookspec
def on_detach(session: Session) -> None:
    """Fire once, when the session is detached; the optimizer is already free again."""


HOOKS: tuple[str, ...] = (
    "on_attach",
    "observe_gradients",
    "on_skip",
    "transform_gradients",
    "before_update",
    "after_update",
    "on_step_end",
    "on_event",
    "on_metrics",
    "on_detach",
)


def hooks_of(plugin: Any) -> tuple[str, ...]:  # noqa: ANN401 - any object may be a plugin
    """Return the hooks that a plugin or a plugin class implements, in firing order."""
    marked = (getattr(plugin, name, None) for name in HOOKS)
    return tuple(
        name
        for name, function in zip(HOOKS, marked, strict=True)
        if getattr(function, "stablekit_impl", None) is not None
    )
