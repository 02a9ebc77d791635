"""One call of ``optimizer.step()`` as a plugin sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit._measure import norms_of
from stablekit.errors import HookError
from stablekit.gradients import Gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stablekit._round import Round
    from stablekit._session import Session
    from stablekit.scalars import Flag, Scalar

__all__ = ["Step"]


@final
class Step:
    """What a hook receives: the gradients, the moment, and what a plugin may say about it.

    Example:
        >>> import stablekit
        >>> class SkipHuge:
        ...     name = "skip-huge"
        ...
        ...     @stablekit.hookimpl
        ...     def observe_gradients(self, step):
        ...         norm = step.gradients.raw_norm()
        ...         step.record("norm", norm)
        ...         step.skip("the gradient norm is over 1000", when=norm > 1000)
    """

    __slots__ = ("_chosen", "_named", "_plugin", "_round")

    def __init__(
        self,
        moment: Round,
        plugin: str = "",
        chosen: tuple[int, ...] | None = None,
        *,
        named: bool = False,
    ) -> None:
        """Show a step to a plugin, restricted to the parameters at the chosen positions."""
        self._named = named
        self._round = moment
        self._plugin = plugin
        self._chosen = chosen

    @property
    def number(self) -> int:
        """How many calls of ``step()`` reached the optimizer, this and skipped ones included."""
        return self._round.number

    @property
    def updates(self) -> int:
        """How many updates were applied before this step."""
        return self._round.updates

    @property
    def evaluation(self) -> int:
        """Which evaluation of the closure this is, from 0; always 0 without a closure."""
        return self._round.evaluation

    @property
    def ok(self) -> Tensor:
        """0-dim bool on the gradients' device: false where the step is skipped."""
        return self._round.ok

    @property
    def learning(self) -> Tensor:
        """0-dim bool on the gradients' device: true where statistics may move."""
        return self._round.learning(self._chosen)

    @property
    def session(self) -> Session:
        """The session this step belongs to."""
        return self._round.session

    @property
    def gradients(self) -> Gradients:
        """The gradients, or those of the parameters this plugin was restricted to.

        Raises:
            HookError: The step is over and its gradients were let go.
        """
        ledger = self._round.ledger
        if ledger is None:
            raise HookError("the gradients of a step are gone once it has ended")
        return Gradients(ledger, self._chosen, writable=self._round.phase == "transform_gradients")

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, or those this plugin was restricted to, in the order of the groups."""
        params = self._round.params
        return params if self._chosen is None else [params[i] for i in self._chosen]

    @property
    def named(self) -> bool:
        """Whether the parameters were chosen by name, with ``only(..., include=...)``.

        What leaves norms and biases alone by default takes those that were named.
        """
        return self._named

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter group of each of :attr:`parameters`, the optimizers' own dictionaries."""
        groups = [
            group
            for optimizer in self._round.optimizers
            for group in optimizer.param_groups
            for _ in group["params"]
        ]
        return groups if self._chosen is None else [groups[i] for i in self._chosen]

    @property
    def states(self) -> list[dict[str, Any]]:
        """The optimizer's state of each of :attr:`parameters`, empty before its first update.

        :mod:`stablekit.moments` knows what optimizers call the entries.
        """
        states = [
            optimizer.state.get(param, {})
            for optimizer in self._round.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        return states if self._chosen is None else [states[i] for i in self._chosen]

    @property
    def loss(self) -> Tensor | None:
        """Mean of the losses observed since the last step, detached, over data-parallel ranks."""
        return self._round.loss()

    @property
    def lr(self) -> float | Tensor:
        """The learning rate of the first parameter group."""
        rate: float | Tensor = self._round.optimizers[0].param_groups[0]["lr"]
        return rate

    def scalar(self, value: Tensor) -> Scalar:
        """Return a 0-dim tensor as a float in host mode, as it is in device mode.

        What is computed from it with the operators and :mod:`stablekit.scalars` is written once.
        """
        return value.item() if self._round.session.host else value

    def flag(self, value: Tensor) -> Flag:
        """Return a 0-dim bool tensor as a bool in host mode, as it is in device mode."""
        return bool(value) if self._round.session.host else value

    @property
    def recorded(self) -> Mapping[str, Tensor | float]:
        """The metrics of this step so far, by name; tensors are where they were made.

        Complete in ``on_step_end``, but for what plugins listed later record there.
        """
        return self._round.session.latest.of_step()

    def norms_of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return L2 norms of tensors placed like :attr:`parameters`, float32 ``[P]``.

        For what is no gradient: weights, updates, moments. DTensors, or the local parts of them;
        None counts as zeros. The same on all ranks, at the price of one reduction where parameters
        are sharded, so every rank must ask.

        Raises:
            ValueError: The number of tensors is not that of the parameters.
        """
        count = len(self.parameters)
        if len(tensors) != count:
            raise ValueError(f"expected {count} tensors, one a parameter, got {len(tensors)}")
        return norms_of(tensors, self._round.layout, self._chosen)

    def record(self, name: str, value: Tensor | float) -> None:
        """Report a metric ``<plugin>/<name>``; a tensor is read on the host only when someone asks.

        ``threshold``, ``factor`` and ``clipped`` (the share of tensors or units clipped in this
        step, 0 to 1) mean the same for every plugin.
        """
        self._round.record(self._plugin, name, value)

    def skip(
        self, reason: str, when: bool | Tensor = True, *, tensors: Tensor | None = None
    ) -> None:
        """Skip this step: no parameter, no optimizer state and no statistic moves.

        Args:
            reason: one sentence for the event and the log.
            when: a bool, or a 0-dim bool tensor where the decision was made on the device.
            tensors: bool ``[P]``, the culprits to be named in the event.

        Raises:
            HookError: Called outside ``observe_gradients``.
        """
        if self._round.phase != "observe_gradients":
            raise HookError(
                f"step.skip is legal in observe_gradients only; plugin {self._plugin!r} called it"
                f" in {self._round.phase or 'no hook'}"
            )
        self._round.ask_to_skip(self._plugin, reason, when, self._all(tensors))

    def emit(
        self,
        kind: str,
        message: str = "",
        *,
        when: bool | Tensor = True,
        tensors: Tensor | Sequence[str] = (),
        **data: Any,  # noqa: ANN401 - any plain value or tensor
    ) -> None:
        """Emit an :class:`~stablekit.Event` with this plugin's name.

        Args:
            kind: one word.
            message: one sentence for a person.
            when: emit only where this is true; may be a 0-dim tensor on the device.
            tensors: names; or a bool ``[P]`` that says which parameters are concerned; or their
                positions in int64, worst first, where a negative one stands for none.
            **data: plain values, or tensors to be read on the host together with ``when``.
        """
        named = self._all(tensors) if isinstance(tensors, Tensor) else tuple(tensors)
        self._round.emit(
            kind, self._plugin, message, when, named if named is not None else (), data
        )

    def defer(self, receive: Callable[..., None], *tensors: Tensor) -> None:
        """Call ``receive`` with the tensors' values (numbers, or lists of them) on the host.

        At once in host mode; at the next host read, at most ``log_every`` steps later, in device
        mode. The way for a plugin to act on a value without stalling the device.
        """
        self._round.session.mail.send(receive, *tensors)

    def _all(self, tensors: Tensor | None) -> Tensor | None:
        """Turn a mask or positions over this plugin's parameters into one over all."""
        if tensors is None or self._chosen is None:
            return tensors
        layout = self._round.layout
        places = layout.subset(self._chosen)
        if tensors.dtype != torch.bool:
            return torch.where(tensors < 0, tensors, places[tensors.clamp(min=0)])
        return layout.mask(()).index_copy(0, places, tensors)
