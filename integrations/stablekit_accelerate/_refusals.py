"""What plugins cannot work with, found when a session is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SUPPORTED = "Supported are one process, DDP and FSDP2 (fsdp_version=2)"
_ENGINES = {
    "DEEPSPEED": "DeepSpeed clips and steps inside accelerator.backward, before any plugin",
    "MEGATRON_LM": "Megatron-LM replaces the optimizer by its own and steps it itself",
    "FSDP": (
        "FSDP1 hands out parts of parameters as if they were whole, so that every rank would see a"
        " norm of its own"
    ),
}


def refuse_engine(accelerator: Accelerator) -> None:
    """Refuse an accelerator under which plugins would see the wrong gradients, or none.

    Raises:
        AttachError: DeepSpeed, Megatron-LM or FSDP1 is at work.
    """
    kind = accelerator.distributed_type.value
    if kind in _ENGINES and not (kind == "FSDP" and accelerator.is_fsdp2):
        raise AttachError(f"{_ENGINES[kind]}. {_SUPPORTED}")
