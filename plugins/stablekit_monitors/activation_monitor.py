"""Naming the module in which a forward pass stops being finite."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from stablekit import hookimpl
from stablekit.arguments import flag, plugin_name, whole
from stablekit.forward import Sampling, modules
from stablekit_monitors._passes import INPUT, OUTPUT, Passes, first_bad, place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Event, Session, Step
    from stablekit_monitors._passes import Pass

__all__ = ["ActivationMonitor"]

_BAD = ("nonfinite", "scaler-skip")


@final
class ActivationMonitor:
    """Name the first module whose output is not finite, where the gradients are not.

    In a step that is looked at, the smallest and the largest element of every output are kept on
    the device, in the order in which the modules ran; micro-batches one after the other. They are
    read only if the norm of the gradients is not finite. Then there is one event, the same on all
    ranks:

    * "nonfinite-activation": ``module``, the first whose output is not finite ("(input)": what the
      model was given; "(output)": what it returned, a loss for instance), ``value`` ("nan" or
      "inf"), ``forward_pass``, from 0, in a step of several.
    * "nonfinite-backward": every output was finite, so the fault is in a loss outside of the model,
      or in the backward pass.

    Looked at are the modules without children, the members of module lists (blocks), and what the
    model takes and returns. Between two of them there may be code of the model itself: the fault is
    in the module named or in what is computed between it and the one before. An output that is
    infinite on purpose (a mask as a module's output) is named wrongly: leave it out by ``watch``.

    It cannot tell of a step that it did not look at. With ``every=1`` it looks at all of them. With
    more, a fault that passes is missed; one that stays is named in the next step, since every step
    after a bad one is looked at. (In device mode a bad step is heard of at the next log point.) A
    step that a GradScaler holds back entirely is seen by nobody. Forward passes in evaluation mode,
    without gradients or inside ``torch.compile`` are not looked at.

    Event "unseen": nothing was there to be looked at in the first sampled step.

    Args:
        every: look at the steps whose number this divides, at least 1.
        watch: names of the modules to look at, in which ``*`` stands for one part, instead of all
            those above.
        reduce: agree with all ranks, which costs one reduction in a bad step, and in device mode in
            every step that is looked at. Must be False where ranks hold different modules (pipeline
            parallelism).
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> class Root(nn.Module):
        ...     def forward(self, x):
        ...         return x.sqrt()
        >>> model = nn.Sequential(nn.Linear(1, 1), Root(), nn.Identity())
        >>> _ = model[0].weight.data.fill_(-1.0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> session = stablekit.attach(
        ...     optimizer, "nonfinite-guard", ActivationMonitor(), model=model
        ... )
        >>> model(torch.full((1, 1), 9.0)).sum().backward()
        >>> optimizer.step()
        >>> session.events[-1].kind, session.events[-1].data["module"]
        ('nonfinite-activation', '1')
    """

    needs = ("model",)
    cost = (
        "in steps looked at one read of every output, and over ranks one reduction in a bad step;"
        " otherwise one flag for each module"
    )

    def __init__(
        self,
        every: int = 1,
        *,
        watch: str | None = None,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.watch = modules.pattern("watch", watch)
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "activation-monitor")
        self._sampling = Sampling(self.every)
        self._passes: Passes | None = None
        self._was_bad = False

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Listen to the model."""
        model = modules.model_of(session, self.name)
        self._passes = Passes(model, self._watched(model), self._sampling)
        self._sampling.attach(session)

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Look at the next step if this one was bad; in device mode that is heard of late."""
        if event.kind in _BAD:
            self._was_bad = step.session.host  # the end of the step is still to come
            self._sampling.is_armed |= not step.session.host

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Find the culprit of a bad step."""
        if self._passes is not None:
            passes = self._passes.take()
            if self._sampling.is_armed:
                self._judge(step, passes)
        self._sampling.arm(step.number)
        self._sampling.is_armed |= self._was_bad
        self._was_bad = False

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._sampling.detach()
        self._passes = None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is looked at."""
        return self._sampling.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: A field is not a bool.
        """
        self._sampling.load_state_dict(state)

    def _watched(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.watch is not None:
            return modules.matching(model, self.watch, argument="watch")
        by_name = modules.named(model)
        return {
            name or OUTPUT: module
            for name, module in by_name.items()
            if not name or not [*module.children()] or _is_listed(by_name, name)
        }

    def _judge(self, step: Step, passes: list[Pass]) -> None:
        norm = step.gradients.raw_norm()
        seen, what = torch.tensor(bool(passes)), "no forward pass was seen"
        self._sampling.complain(step, seen, what, compiles=False)
        is_bad = step.flag(~norm.isfinite())
        if is_bad is False:
            return
        where = first_bad(passes, norm.device)
        if self.reduce:
            where = step.session.reduce(where, "min")
        names = [one.names for one in passes]
        step.defer(partial(self._tell, step, names), torch.as_tensor(is_bad), *place_of(where))

    def _tell(
        self, step: Step, names: list[list[str]], is_bad: bool, number: int, place: int, is_nan: int
    ) -> None:
        if not is_bad or not names:
            return
        if number < 0:
            step.emit(
                "nonfinite-backward",
                f"the gradients are not finite, but all {sum(map(len, names))} outputs looked at"
                " are: it began in a loss outside of the model or in the backward pass",
            )
            return
        name, value = _at(names, int(number), int(place)), "nan" if is_nan else "inf"
        what = "what the model was given" if name == INPUT else f"the output of {name}"
        step.emit(
            "nonfinite-activation",
            f"{what} is the first that is not finite ({value})",
            module=name,
            value=value,
            forward_pass=int(number),
        )


def _at(names: list[list[str]], number: int, place: int) -> str:
    """Return a name; what another rank found need not be among what this one ran."""
    run = names[number] if number < len(names) else []
    return run[place] if place < len(run) else "(on another rank)"


def _is_listed(by_name: Mapping[str, nn.Module], name: str) -> bool:
    return isinstance(by_name.get(name.rpartition(".")[0]), nn.ModuleList)
