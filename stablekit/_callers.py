"""Whether torch.distributed.checkpoint is who calls: it gives no sign of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_PACKAGE = "torch.distributed.checkpoint."
_MODULE = f"{_PACKAGE}state_dict"
_NEAR = 12
"""Between it and a hook are GradScaler, Accelerate's wrapper, and decorators of torch."""


def is_checkpointing(frame: FrameType | None) -> bool:
    """Tell whether a call was made, a few frames up, by torch.distributed.checkpoint.

    It steps an optimizer without state to make it have some, and drops from an optimizer's state
    dictionary all that is not of parameters.
    """
    for _ in range(_NEAR):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False


def takes_apart(frame: FrameType) -> bool:
    """Tell whether a state was asked for by torch.distributed.checkpoint itself.

    It saves every value in it on its own, and can load none that the loading process lacks.
    """
    return str(frame.f_globals.get("__name__")).startswith(_PACKAGE)
