"""A Trainer with plugins, attached in either of the two ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import stablekit
import stablekit_transformers
from stablekit_transformers import StableKitCallback
from tests.transformers.tiny import trainer

if TYPE_CHECKING:
    from pathlib import Path

    from stablekit import Step
    from tests.transformers.tiny import FaultyTrainer

MODES = ("callback", "attach")


class Watch:
    """Keep the norms that plugins get to see."""

    name = "watch"

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float] = []

    @stablekit.hookimpl
    def observe_gradients(self, step: Step) -> None:
        self.norms.append(float(step.gradients.raw_norm()))
        if step.loss is not None:
            self.losses.append(float(step.loss))


def equipped(
    mode: str,
    folder: Path,
    *plugins: Any,  # noqa: ANN401 - as stablekit.attach
    options: dict[str, Any] | None = None,
    **given: Any,  # noqa: ANN401 - as trainer
) -> tuple[FaultyTrainer, StableKitCallback]:
    if mode == "callback":
        callback = StableKitCallback(*plugins, **(options or {}))
        return trainer(folder, callbacks=[callback], **given), callback
    made = trainer(folder, **given)
    return made, stablekit_transformers.attach(made, *plugins, **(options or {}))
