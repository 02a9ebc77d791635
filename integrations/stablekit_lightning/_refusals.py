"""What the callback does not work with, found before the first step instead of in the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stablekit.errors import AttachError
from stablekit.hookspecs import hooks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from stablekit import Session

_STRATEGIES = {
    "DeepSpeedStrategy": "DeepSpeed clips and steps inside its own engine",
    "FSDPStrategy": (
        "FSDP1 hands out parts of parameters as if they were whole, so that every rank would see a"
        " norm of its own; use ModelParallelStrategy (FSDP2)"
    ),
}


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which plugins would see the wrong gradients.

    Strategies are told by their name: those of ``lightning`` and ``pytorch_lightning`` are
    different classes.

    Raises:
        AttachError: The strategy is one of them.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _STRATEGIES:
            raise AttachError(f"{kind.__name__} is not supported: {_STRATEGIES[kind.__name__]}")


def refuse_second_clip(trainer: Trainer, sessions: Sequence[Session]) -> None:
    """Refuse Lightning's own clipping next to a plugin that changes gradients.

    Raises:
        AttachError: ``gradient_clip_val`` is set and a plugin transforms gradients.
    """
    if not trainer.gradient_clip_val:
        return
    for session in sessions:
        for name, plugin in session.plugins.items():
            if "transform_gradients" in hooks_of(plugin):
                raise AttachError(
                    f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips before"
                    f" {name!r} sees the gradients; remove gradient_clip_val, and list"
                    f" {_substitute(trainer)!r} among the plugins if you want that limit too"
                )


def refuse_unclear(count: int, plugins: Sequence[Any], *, together: bool | None) -> None:
    """Refuse to guess how several optimizers belong together.

    Raises:
        AttachError: There is no optimizer, or nobody said whether several step together, or one
            plugin object would keep the statistics of several sessions.
    """
    if count == 0:
        raise AttachError("configure_optimizers returned no optimizer to attach to")
    if count > 1 and together is None:
        raise AttachError(
            f"configure_optimizers returned {count} optimizers; pass together=True if all of them"
            " step every time (one norm, one decision), together=False if they take turns (a"
            " session each)"
        )
    shared = [plugin for plugin in plugins if not isinstance(plugin, (str, Mapping))]
    if count > 1 and not together and shared:
        raise AttachError(
            f"with together=False each of {count} optimizers needs plugins of its own: give"
            f" {type(shared[0]).__name__} by name or as a mapping, not as an object"
        )


def _substitute(trainer: Trainer) -> str:
    """Return the plugin that does what Lightning's own clipping would."""
    limit = trainer.gradient_clip_val
    by_value = trainer.gradient_clip_algorithm == "value"
    return f"clip-value:limit={limit}" if by_value else f"global-norm:max_norm={limit}"
