"""Attaching to a Trainer rather than to its optimizer, for what a callback cannot reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stablekit.errors import AttachError
from stablekit_transformers._callback import StableKitCallback
from stablekit_transformers._checkpoint import refuse_surgeries
from stablekit_transformers._clipping import norm_only
from stablekit_transformers._report import merge_metrics

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer


def attach(trainer: Trainer, *plugins: Any, **options: Any) -> StableKitCallback:  # noqa: ANN401 - as stablekit.attach
    """Attach plugins to the optimizer of a Trainer, as soon as it has one, and return the callback.

    Call it before ``trainer.train()``. Beyond what :class:`StableKitCallback` does: plugins act
    before Trainer's clipping, which only measures from now on (``max_grad_norm`` is applied by
    ``global-norm`` if no plugin transforms gradients); metrics go where ``trainer.log`` goes;
    ``step.loss`` is what Trainer optimizes; plugin state is restored with the optimizer's, from
    whatever checkpoint Trainer loads. ``callback.detach()`` ends it.

    Args:
        trainer: a Trainer, or one derived from it.
        *plugins: as for :func:`stablekit.attach`.
        **options: further arguments of :func:`stablekit.attach`; ``model`` is the trainer's.

    Raises:
        AttachError: The trainer has a ``StableKitCallback`` already.
        ValueError: A string names no plugin, or one with arguments out of range.
        TypeError: It has arguments of the wrong kind.

    Example:
        >>> import stablekit_transformers
        >>> # kit = stablekit_transformers.attach(trainer, "nonfinite-guard", "zclip")
        >>> # trainer.train()
        >>> # print(kit.session.summary())
    """
    if any(
        isinstance(one, StableKitCallback) and not one.is_off
        for one in trainer.callback_handler.callbacks
    ):
        raise AttachError(
            "this trainer has a StableKitCallback already; list all plugins in one attach(...)"
        )
    callback = StableKitCallback(*plugins, **options)
    callback.sees_trainer = True
    trainer.add_callback(callback)
    _attach_at_creation(trainer, callback)
    _restore_with_optimizer(trainer, callback)
    _observe_losses(trainer, callback)
    _log_metrics(trainer, callback)
    if not options.get("dry_run"):
        accelerator = trainer.accelerator
        accelerator.clip_grad_norm_ = norm_only(
            accelerator, accelerator.clip_grad_norm_, lambda: callback.is_off
        )
    return callback


def _attach_at_creation(trainer: Any, callback: StableKitCallback) -> None:  # noqa: ANN401 - its methods are replaced
    """Attach before a checkpoint is loaded, so that the optimizer's state brings the plugins'."""
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as Trainer's
        created = create(*args, **kwargs)
        callback.begin(trainer.optimizer, trainer.model, trainer.args)
        return created

    trainer.create_optimizer = create_optimizer


def _restore_with_optimizer(trainer: Any, callback: StableKitCallback) -> None:  # noqa: ANN401 - its methods are replaced
    """Continue from checkpoints whose optimizer has lost the plugins' state, as under FSDP."""
    load = trainer._load_optimizer_and_scheduler

    def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
        if checkpoint is not None and not callback.is_off:
            refuse_surgeries(trainer.model, checkpoint)
        load(checkpoint)
        if checkpoint is not None:
            callback.restore_beside(checkpoint)

    trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler


def _observe_losses(trainer: Any, callback: StableKitCallback) -> None:  # noqa: ANN401 - its methods are replaced
    take = trainer.training_step

    def training_step(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - as Trainer's
        loss: Tensor = take(model, *args, **kwargs)
        # Trainer has divided it by the number of micro-batches, and a session takes their mean.
        if not callback.is_off:
            callback.session.observe(loss=loss * trainer.current_gradient_accumulation_steps)
        return loss

    trainer.training_step = training_step


def _log_metrics(trainer: Any, callback: StableKitCallback) -> None:  # noqa: ANN401 - its methods are replaced
    log = trainer.log

    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as Trainer's
        if "loss" in logs and not callback.is_off:
            merge_metrics(logs, callback.session)
        log(logs, *args, **kwargs)

    trainer.log = log_with_metrics
