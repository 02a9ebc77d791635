"""The way onto ``model.loss_function`` and off it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import Sampling, modules
from stablekit_logits._doors_on import LOSS, refuse_second
from stablekit_logits._heads import head_names
from stablekit_logits._liger import refuse_liger
from stablekit_logits._loss_call import LossCall, Shape, shape_of
from stablekit_logits._tally import Tally
from stablekit_logits._use import Use

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session, Step

__all__ = ["LossDoor"]


@final
class LossDoor:
    """Calls a function around a model's loss function, in training only.

    Several doors may be on one model: that opened first gets the logits first, and what it passes
    on is what the next one sees. They may be closed in any order.

    ``around`` gets a :class:`LossCall` and returns the loss, usually what ``call.loss(...)``
    returns. It runs in the forward pass: no host reads, and inside ``torch.compile`` no reads of
    Python numbers that change from step to step, which would compile anew (set an attribute of the
    plugin at the end of a step instead, and change it rarely). What it wants to tell goes to
    ``tally``. In a dry run what it returns is not used.

    A plugin opens it in ``on_attach``, calls ``check(step)`` in ``observe_gradients``,
    ``tally.record(step)`` in ``on_step_end`` and closes it in ``on_detach``.

    Args:
        plugin: the name of who asks.
        metrics: names of the columns of ``tally``.
        around: see above.
        instead: what else can be done where the loss is computed elsewhere; ``{head}`` in it
            becomes the name of the module that makes the logits.
    """

    def __init__(
        self,
        plugin: str,
        *metrics: str,
        around: Callable[[LossCall], Tensor],
        instead: str = "call the plain function of stablekit_logits in the loss",
    ) -> None:
        """Keep it closed."""
        self.plugin, self.around, self.instead = plugin, around, instead
        self.tally = Tally(*metrics)
        self._use = Use(plugin)
        self._sampling = Sampling(every=1)
        self._model: nn.Module | None = None

    def open(self, session: Session) -> None:
        """Step between a model and its loss function.

        Raises:
            AttachError: There is no model, it has no loss function that can be replaced, or one
                whose arguments are not known, or this plugin acts on it for another session.
        """
        model = _owner(modules.model_of(session, self.plugin), self.plugin)
        refuse_liger(model, self.plugin)
        refuse_second(session, self.plugin)
        wrapped: Any = model.__dict__.get(LOSS)
        if not isinstance(wrapped, _Wrapped):
            wrapped = _Wrapped(model, self.plugin)
        wrapped.doors.append(self)
        model.__dict__[LOSS] = wrapped
        self._model = model
        self._use.start()
        self._sampling.attach(session)
        self.tally.open(session, modules.device_of(model))

    def close(self, session: Session) -> None:
        """Step back, if it is open for a session; the last one leaves the model as it was."""
        if self.session is not session:
            return
        model, self._model = self._model, None
        self._sampling.detach()
        self.tally.close()
        if model is None:
            return
        wrapped = model.__dict__.get(LOSS)
        if isinstance(wrapped, _Wrapped):
            wrapped.remove(self, model)

    @property
    def session(self) -> Session | None:
        """The session it is open for."""
        return self._sampling.session

    def check(self, step: Step) -> None:
        """Raise if no step computed its loss here yet, tell of the first that no longer did.

        Raises:
            AttachError: None did; training would not be what was asked for.
        """
        if self._model is not None:
            where = f"the loss function of {type(self._model).__name__}"
            self._use.check(step, self._model, where, self._why)

    def _why(self) -> str:
        assert self.session is not None
        model = modules.model_of(self.session, self.plugin)
        head = next(iter(head_names(model)), "lm_head")
        return (
            "the loss is computed elsewhere (labels= is not passed to the model,"
            " compute_loss_func=, label_smoothing_factor=, a fused or custom loss, a model that"
            " does not call loss_function). Let the model compute its loss, or"
            f" {self.instead.format(head=head)}"
        )

    def pass_on(
        self, shape: Shape, arguments: dict[str, Any], then: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """Call ``around`` in training, and the next door at other times."""
        model, session = self._model, self._sampling.session
        given = (arguments.get("labels"), arguments.get("shift_labels"))
        if model is None or session is None or all(one is None for one in given):
            return then(arguments)
        if not self._use.looks(self._sampling, model):
            return then(arguments)
        call = LossCall(shape, arguments, then)
        call.refuse_values(self.plugin)
        if not session.dry_run:
            return self.around(call)
        with torch.no_grad():
            self.around(call)
        return then(arguments)


@final
class _Wrapped:
    """What a model calls in place of its loss function while doors are open."""

    def __init__(self, model: nn.Module, plugin: str) -> None:
        """Take the place of the present function, remembering whether the model had its own."""
        self.had_own = LOSS in model.__dict__
        self.inner: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]  # checked by _owner
        shape = shape_of(self.inner)
        if shape is None:
            name = getattr(self.inner, "__name__", type(self.inner).__name__)
            raise AttachError(
                f"{plugin} does not know what the arguments of the loss function {name} of"
                f" {type(model).__name__} mean. It knows those of transformers for language models"
                " and for classification of sequences, images and tokens, and functions of"
                " (logits, labels, shift_labels=None, ...); else call the plain function of"
                " stablekit_logits in the loss"
            )
        self.shape = shape
        self.doors: list[LossDoor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - as the function's own
        """Return the loss."""
        return self._from(0, {**dict(zip(self.shape.parameters, args, strict=False)), **kwargs})

    def _from(self, place: int, arguments: dict[str, Any]) -> Tensor:
        if place == len(self.doors):
            return self.inner(**arguments)

        def then(changed: dict[str, Any]) -> Tensor:
            return self._from(place + 1, changed)

        return self.doors[place].pass_on(self.shape, arguments, then)

    def remove(self, door: LossDoor, model: nn.Module) -> None:
        """Take one out; with the last one the place is given back."""
        self.doors.remove(door)
        if self.doors:
            return
        del model.__dict__[LOSS]
        if self.had_own:
            model.__dict__[LOSS] = self.inner

    def doors_open(self) -> list[tuple[str, Session]]:
        """Return the plugins that act here and their sessions."""
        return [(door.plugin, door.session) for door in self.doors if door.session is not None]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle as the function itself: a copied model is not the one trained."""
        return _itself, (self.inner,)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _owner(model: nn.Module, plugin: str) -> nn.Module:
    """Return the outermost module with a ``loss_function`` that can be set: PEFT is around it."""
    for module in model.modules():
        found = getattr(type(module), "loss_function", None)
        if isinstance(found, property) and found.fset is not None:
            return module
    raise AttachError(
        f"{plugin} acts on model.loss_function, which {type(model).__name__} does not have as"
        " models of transformers do; name the module that makes the logits with on= if the plugin"
        " takes it, or call the plain function of stablekit_logits in the loss"
    )
