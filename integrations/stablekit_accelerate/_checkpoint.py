"""The session in ``save_state`` and ``load_state``, by exactly one channel.

Everywhere but under FSDP the optimizer's own state dictionary carries it. FSDP saves of an
optimizer what belongs to parameters, so there the session has a file of its own, written by the
main process and read by all, which is right since the state is the same on every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from accelerate.utils import save

if TYPE_CHECKING:
    from accelerate import Accelerator

    from stablekit import Session


@final
class Checkpoints:
    """The hooks of an accelerator through which one session is saved and restored."""

    def __init__(self, accelerator: Accelerator, session: Session, index: int) -> None:
        """Register them."""
        self.accelerator = accelerator
        self.session = session
        self.name = f"stablekit_{index}.bin" if index else "stablekit.bin"
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Leave the accelerator without them."""
        for handle in self._handles:
            handle.remove()

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        if self._has_own_file:
            everywhere = self.accelerator.project_configuration.save_on_each_node
            save(self.session.state_dict(), Path(folder, self.name), save_on_each_node=everywhere)

    def _load(self, models: list[Any], folder: str) -> None:
        path = Path(folder, self.name)
        if self._has_own_file and path.is_file():  # without it, the session warns at its next step
            saved = torch.load(path, weights_only=True, map_location="cpu")
            self.session.load_state_dict(saved, strict=False)

    @property
    def _has_own_file(self) -> bool:
        return bool(self.accelerator.distributed_type.value == "FSDP")
