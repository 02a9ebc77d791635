"""Engines that keep parameters or steps to themselves, and how they are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from types import FrameType

SUPPORTED = (
    "Supported are plain torch, DDP, FSDP2 (torch.distributed.fsdp.fully_shard) and tensor"
    " parallelism by DTensors"
)

_BY_NAME = {
    "DeepSpeedOptimizerWrapper": "DeepSpeed steps inside accelerator.backward",
    "MegatronLMOptimizerWrapper": "Megatron-LM replaces the optimizer by its own",
}
_BY_PACKAGE = {
    "deepspeed.": "DeepSpeed shows hooks flat shards it has already clipped",
    "megatron.": "Megatron-LM clips, and steps on parts of parameters, by itself",
}
_NEAR = 8


def refuse_engine(candidate: object) -> None:
    """Refuse an object that belongs to an engine.

    Raises:
        AttachError: It does; the message names what is supported.
    """
    reason = _reason(candidate)
    if reason:
        raise AttachError(
            f"{type(candidate).__name__} cannot be attached to: {reason}. {SUPPORTED}."
        )


def refuse_inside_engine(frame: FrameType | None) -> None:
    """Refuse to work on an optimizer that an engine has taken over since it was attached.

    Args:
        frame: the call of the optimizer's step.

    Raises:
        AttachError: An engine's own optimizer is what calls it.
    """
    for _ in range(_NEAR):
        if frame is None:
            return
        # Asking for the locals of a frame keeps them alive in it: not those of a training loop.
        is_step = frame.f_code.co_name.endswith("step") and frame.f_code.co_argcount > 0
        caller = frame.f_locals.get("self") if is_step else None
        if caller is not None and "Optimizer" in type(caller).__name__ and _reason(caller):
            raise AttachError(
                f"the optimizer of this session was handed to {type(caller).__name__}, which steps"
                f" it: {_reason(caller)}, so norms would be wrong. {SUPPORTED}."
            )
        frame = frame.f_back


def _reason(candidate: object) -> str:
    kind = type(candidate)
    if kind.__name__ in _BY_NAME:
        return _BY_NAME[kind.__name__]
    found = [why for package, why in _BY_PACKAGE.items() if kind.__module__.startswith(package)]
    return found[0] if found else ""
