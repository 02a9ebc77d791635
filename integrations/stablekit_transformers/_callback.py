"""The callback: Trainer's moments, translated for a session."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, final

from transformers import TrainerCallback

from stablekit.errors import AttachError, StateWarning
from stablekit_transformers import _checkpoint
from stablekit_transformers._clipping import BuiltInClipping
from stablekit_transformers._losses import PartialLosses
from stablekit_transformers._names import refuse_misspelt
from stablekit_transformers._report import Reporter, merge_metrics
from stablekit_transformers._sessions import Sessions

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

    When training ends the session is detached: optimizer and model are as without plugins, for
    whatever uses them next, and what changes the model while attached (``soft-cap``) has ended.
    Another ``train()`` with the same optimizer goes on where plugins were. A training that raised
    leaves it attached: :meth:`detach`.

    A callback does not see the trainer, so it cannot put metrics into TensorBoard or W&B, blame a
    NaN on the one tensor that has it, or restore state from a checkpoint that was moved without
    ``args.resume_from_checkpoint`` saying where to. :func:`stablekit_transformers.attach` can.

    Args:
        *plugins: as for :func:`stablekit.attach`.
        **options: further arguments of :func:`stablekit.attach`; ``model`` is given by Trainer.

    Raises:
        ValueError: A string names no plugin, or one with arguments out of range.
        TypeError: It has arguments of the wrong kind.
        AttachError: when training begins: another session holds the optimizer, perhaps that of a
            second ``StableKitCallback``.
        StateError: when training resumes from what a model with other surgeries has left.

    Example:
        >>> from stablekit_transformers import StableKitCallback
        >>> callback = StableKitCallback("nonfinite-guard", "zclip:z_thresh=3.0")
        >>> # Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
        >>> # print(callback.session.summary())
    """

    def __init__(self, *plugins: Any, **options: Any) -> None:  # noqa: ANN401 - as stablekit.attach
        """Keep the arguments until there is an optimizer."""
        refuse_misspelt(plugins)
        self.sees_trainer = False
        self.is_off = False
        self.clipping = BuiltInClipping()
        self._sessions = Sessions(plugins, options, self.clipping)
        self._losses = PartialLosses()
        self._reporter = Reporter()
        self._said = False

    @property
    def session(self) -> Session:
        """The session of the latest training, detached when that is over.

        Events, metrics and ``summary()`` stay readable.

        Raises:
            AttachError: Training has not begun.
        """
        session = self._sessions.latest
        if session is None:
            raise AttachError("there is no session before training begins; call trainer.train()")
        return session

    def detach(self) -> None:
        """Leave the rest of this training and all that follow alone; a second call does nothing."""
        self.is_off = True
        self._losses.end()
        self.clipping.give_back()
        self._sessions.end()

    def begin(
        self,
        optimizer: Any,  # noqa: ANN401 - maybe wrapped
        model: nn.Module,
        args: TrainingArguments,
        *,
        resumed: bool = False,
    ) -> bool:
        """Attach to an optimizer unless that was done before, and tell whether it was done now.

        Raises:
            AttachError: Another session holds the optimizer.
        """
        if self.is_off:
            return False
        return self._sessions.begin(optimizer, model, args, resumed=resumed)

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
        if self.is_off:
            return
        resumed = state.global_step > 0
        if resumed and not self.sees_trainer:
            _checkpoint.refuse_other_model(model, args, state)
        is_new = self.begin(optimizer, model, args, resumed=resumed)
        if not self.sees_trainer:
            self._losses.begin(model)
            self.clipping.set_aside(args, self.session)
            self._say_limits(args)
        if is_new and resumed:
            self._restore(args, state)
        _checkpoint.mark(state, args)
        self._reporter.begin(self.session)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Give the session the loss of the step."""
        if not self.is_off:
            self._losses.give(self.session, args)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Log what was emitted in this step."""
        if state.is_world_process_zero and not self.is_off:
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
        if self.is_off or self._sessions.latest is None:
            return
        if logs is not None and "loss" in logs:
            merge_metrics(logs, self.session)
            merge_metrics(state.log_history[-1], self.session)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Write the plugins' state where no ``optimizer.pt`` could take it along."""
        if args.should_save and not args.save_only_model and not self.is_off:
            _checkpoint.write_beside(self.session, args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - whatever Trainer passes
    ) -> None:
        """Give everything back, and keep what another ``train()`` goes on with."""
        self.clipping.give_back()
        self._losses.end()
        self._sessions.end()

    def restore_beside(self, folder: str) -> None:
        """Continue from a checkpoint that has no ``optimizer.pt`` to carry the plugins' state."""
        saved = None if self.is_off else _checkpoint.read_beside(folder)
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
