"""The callback: Trainer's moments, translated for a session."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, final

from transformers import TrainerCallback

import stablekit
from stablekit.errors import AttachError, StateWarning
from stablekit_transformers import _checkpoint
from stablekit_transformers._clipping import BuiltInClipping, substitute
from stablekit_transformers._report import Reporter, merge_metrics

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from stablekit import Session

_LOGGER = logging.getLogger("stablekit_transformers")
_LIMITS = (
    "as a callback, stablekit cannot put metrics into TensorBoard or W&B, nor tell in which tensor"
    " a NaN began; stablekit_transformers.attach(trainer, ...) can"
)


@final
class StableKitCallback(TrainerCallback):
    """Attach plugins to the optimizer that Trainer makes, when training begins.

    While training, ``args.max_grad_norm`` is 0: Trainer clips before the optimizer's step and would
    hide the gradients from every plugin. If no plugin transforms gradients, ``global-norm`` clips
    to ``max_grad_norm`` instead; it is given back when training ends. Plugin state travels in
    ``optimizer.pt``; events become warnings in the log, at most 20 of them.

    A callback does not see the trainer, so it cannot put metrics into TensorBoard or W&B, blame a
    NaN on the one tensor that has it, or restore state from a checkpoint that was moved without
    ``args.resume_from_checkpoint`` saying where to. :func:`stablekit_transformers.attach` can.

    Args:
        *plugins: as for :func:`stablekit.attach`.
        **options: further arguments of :func:`stablekit.attach`; ``model`` is given by Trainer.

    Raises:
        AttachError: when training begins: another session holds the optimizer, perhaps that of a
            second ``StableKitCallback``.

    Example:
        >>> from stablekit_transformers import StableKitCallback
        >>> callback = StableKitCallback("nonfinite-guard", "zclip:z_thresh=3.0")
        >>> # Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
        >>> # print(callback.session.summary())
    """

    def __init__(self, *plugins: Any, **options: Any) -> None:  # noqa: ANN401 - as stablekit.attach
        """Keep the arguments until there is an optimizer."""
        self.plugins = plugins
        self.options = options
        self.sees_trainer = False
        self.clipping = BuiltInClipping()
        self._session: Session | None = None
        self._pristine: dict[str, Any] = {}
        self._reporter = Reporter()
        self._said = False

    @property
    def session(self) -> Session:
        """The session; it stays after training, for its events and metrics.

        Raises:
            AttachError: Training has not begun.
        """
        if self._session is None:
            raise AttachError("there is no session before training begins; call trainer.train()")
        return self._session

    def begin(self, optimizer: Any, model: nn.Module, args: TrainingArguments) -> bool:  # noqa: ANN401 - maybe wrapped
        """Attach to an optimizer unless that was done before, and tell whether it was done now.

        Raises:
            AttachError: Another session holds the optimizer.
        """
        found = _session_of(optimizer)
        if found is not None and found is self._session:
            return False
        if found is not None:
            raise AttachError(
                f"this optimizer has a session already, with {', '.join(found.plugins) or 'no'}"
                " plugins: list all plugins in one StableKitCallback or one attach(trainer, ...)"
            )
        if self._session is not None:
            self._session.detach()
        options = {**_following(args), **self.options}
        session = stablekit.attach(optimizer, *self.plugins, model=model, **options)
        limit = self.clipping.limit(args)
        if clipper := substitute(session, limit, tell=args.should_log):
            session.detach()
            plugins = (*self.plugins, *clipper)
            session = stablekit.attach(optimizer, *plugins, model=model, **options)
        if self._session is None:
            self._pristine = session.state_dict()
        else:  # plugins given as instances have learned from the optimizer before
            session.load_state_dict(self._pristine)
        self._session = session
        return True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,  # noqa: ANN401 - accelerate's wrapper
        model: Any = None,  # noqa: ANN401 - maybe wrapped
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Attach, take over clipping, and continue from the checkpoint that was loaded."""
        resumed = state.global_step > 0
        with warnings.catch_warnings():
            if resumed:  # restoring is the next thing to happen
                warnings.simplefilter("ignore", StateWarning)
            is_new = self.begin(optimizer, model, args)
        if not self.sees_trainer:
            self.clipping.set_aside(args, self.session)
            self._say_limits(args)
        if is_new and resumed:
            self._restore(args, state)
        _checkpoint.mark(state, args)
        self._reporter.begin(self.session)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Log what was emitted in this step."""
        if state.is_world_process_zero:
            self._reporter.tell(self.session)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Add metrics to the history, and for the callbacks that come after this one."""
        if self._session is not None and logs is not None and "loss" in logs:
            merge_metrics(logs, self._session)
            merge_metrics(state.log_history[-1], self._session)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Write the plugins' state where no ``optimizer.pt`` could take it along."""
        if args.should_save and not args.save_only_model:
            _checkpoint.write_beside(self.session, args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Give ``max_grad_norm`` back; the session stays for its events and another ``train()``."""
        self.clipping.give_back(args)

    def restore_beside(self, folder: str) -> None:
        """Continue from a checkpoint that has no ``optimizer.pt`` to carry the plugins' state."""
        saved = _checkpoint.read_beside(folder)
        if saved is not None:
            self.session.load_state_dict(saved, strict=False)

    def _say_limits(self, args: TrainingArguments) -> None:
        if not self._said and args.should_log:
            _LOGGER.warning(_LIMITS)
        self._said = True

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        saved, looked = _checkpoint.find(args, state)
        if saved is None:
            warnings.warn(
                f"training resumes at step {state.global_step}, but plugins start afresh: {looked}",
                StateWarning,
                stacklevel=2,
            )
        else:
            self.session.load_state_dict(saved, strict=False)


def _following(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that depend on the device: under FSDP parameters get there later."""
    on_host = args.device.type == "cpu"
    return {"device_mode": not on_host, "log_every": 1 if on_host else 10}


def _session_of(optimizer: Any) -> Session | None:  # noqa: ANN401 - as stablekit.session
    try:
        return stablekit.session(optimizer)
    except AttachError:
        return None
