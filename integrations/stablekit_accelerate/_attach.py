"""The one call that ties a session to an Accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

import stablekit
from stablekit.errors import AttachError
from stablekit_accelerate._companion import Companion
from stablekit_accelerate._desk import Desk
from stablekit_accelerate._refusals import refuse_engine

if TYPE_CHECKING:
    from torch import nn

    from stablekit import Session


def attach(
    accelerator: Accelerator,
    optimizer: Any,  # noqa: ANN401 - as stablekit.attach
    *plugins: Any,  # noqa: ANN401 - as stablekit.attach
    model: nn.Module | None = None,
    observe_loss: bool = True,
    loop_clips: bool = True,
    log_metrics: bool = True,
    report_skips: bool = True,
    **options: Any,  # noqa: ANN401 - as stablekit.attach
) -> Session:
    """Attach plugins to an optimizer, and what the loop does with the accelerator to the session.

    Before or after ``accelerator.prepare``, with one process, DDP or FSDP2. What an argument
    switches off can be done by hand: ``session.observe``, ``session.metrics``, ``session.events``.

    Args:
        accelerator: the one that prepares the optimizer.
        optimizer: as for :func:`stablekit.attach`, prepared or not.
        *plugins: as for :func:`stablekit.attach`.
        model: gives parameters their names; prepared or not.
        observe_loss: take the losses from ``accelerator.backward``.
        loop_clips: where the loop calls ``accelerator.clip_grad_norm_(parameters, max_norm)``, clip
            to ``max_norm`` in the step, after the plugins, which so see what backward left. If
            False, that call only returns the norm.
        log_metrics: give the metrics to ``accelerator.log``, with ``session.number`` as the step,
            and events to the log of the main process. The loss is named ``step_loss``.
        report_skips: have ``accelerator.optimizer_step_was_skipped`` tell of every skipped step, so
            that schedulers prepared by the accelerator wait. Where a plugin may skip, on an
            accelerator device, looking at it costs a host read, which such a scheduler does.
        **options: further arguments of :func:`stablekit.attach`; ``device_mode`` and ``log_every``
            follow the accelerator's device.

    Raises:
        AttachError: DeepSpeed, Megatron-LM or FSDP1 is at work, or another session takes the losses
            of this accelerator already; and as :func:`stablekit.attach`.
        TypeError: The first argument is no Accelerator.

    Example:
        >>> import torch, stablekit_accelerate
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(4, 2)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        >>> session = stablekit_accelerate.attach(accelerator, optimizer, "zclip", model=model)
        >>> accelerator.backward(model(torch.ones(1, 4)).sum())
        >>> optimizer.step()
        >>> session.number
        1
        >>> session.detach()
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"expected an Accelerator and then the optimizer, got a {type(accelerator).__name__}"
        )
    refuse_engine(accelerator)
    desk = Desk.of(accelerator)
    if observe_loss and desk.is_told_losses:
        raise AttachError(
            "another session takes the losses of this accelerator, and nobody can tell whose a loss"
            " is; attach both with observe_loss=False and call session.observe(loss=...) for each"
        )
    companion = Companion(accelerator, log_metrics=log_metrics, report_skips=report_skips)
    on_host = accelerator.device.type == "cpu"
    settings = {"device_mode": not on_host, "log_every": 1 if on_host else 10}
    given = {key: value for key, value in options.items() if value is not None}
    session = stablekit.attach(optimizer, *plugins, companion, model=model, **{**settings, **given})
    companion.join(session, desk, observe_loss=observe_loss, loop_clips=loop_clips)
    return session
