"""The chains of plugins to be replayed, and those that a record of norms cannot answer for."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import stablekit
from stablekit.errors import StablekitError
from stablekit_cli.replay._still import attach_to_nothing

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Chain", "ChainError", "check", "parse_chains"]

REASONS = {
    "elements": "changes single elements of the gradients",
    "amaxes": "looks at the largest element of each tensor",
    "unit_norms": "looks at the norms of output units",
    "weight_unit_norms": "looks at the norms of the weights' output units",
    "parameters": "reads or changes weights or optimizer state",
    "model": "watches the modules of the model",
}


class ChainError(ValueError):
    """A chain that is not known, not well written, or cannot be replayed."""


@dataclass(frozen=True)
class Chain:
    """Plugins that act one after another."""

    label: str
    """As the user wrote it."""
    specs: tuple[Any, ...]
    """What is given to ``stablekit.attach``."""


def parse_chains(texts: Iterable[str]) -> list[Chain]:
    """Return the chains of texts such as ``"zclip"`` and ``"global-norm+autoclip:percentile=50"``.

    Raises:
        ChainError: One is given twice, is malformed, or needs more than norms and losses.

    Example:
        >>> [chain.specs for chain in parse_chains(["zclip", "global-norm+adagc:lambda_rel=1.1"])]
        [('zclip',), ('global-norm', 'adagc:lambda_rel=1.1')]
    """
    # A plus sign before a digit belongs to a number such as 1e+5.
    chains = [
        Chain(text.strip(), tuple(part.strip() for part in re.split(r"\+(?!\d)", text)))
        for text in texts
    ]
    labels = [chain.label for chain in chains]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ChainError(f"{', '.join(sorted(twice))} is given twice")
    for chain in chains:
        check(chain)
    return chains


def check(chain: Chain) -> None:
    """Attach the chain once to one parameter, so that what is wrong with it is found at once.

    Raises:
        ChainError: It cannot be attached, or needs more than norms and losses.
    """
    for spec in chain.specs:
        if "model" in _needs_without_attaching(spec):  # it would ask for model= when attached
            _refuse(getattr(spec, "name", spec), [REASONS["model"]])
    try:
        _, session = attach_to_nothing(["p"], chain.specs)
    except (StablekitError, TypeError, ValueError) as error:
        raise ChainError(f"cannot replay {chain.label!r}: {error}") from error
    for plugin in session.plugins.values():
        if reasons := _reasons(plugin):
            _refuse(plugin.name, reasons)


def _refuse(name: str, reasons: list[str]) -> NoReturn:
    raise ChainError(
        f"cannot replay {name!r}: it {' and '.join(reasons)}; a log holds the norms of whole"
        " gradients and the loss"
    )


def _needs_without_attaching(spec: Any) -> tuple[str, ...]:  # noqa: ANN401 - any plugin form
    """Return what the class of a plugin announces, as far as the form says which class it is."""
    if isinstance(spec, str):
        info = stablekit.available().get(spec.partition(":")[0])
        module, _, attribute = info.entry_point.partition(":") if info else ("", "", "")
        spec = getattr(importlib.import_module(module), attribute) if module else None
    needs: tuple[str, ...] = getattr(spec, "needs", ())
    return needs if isinstance(needs, tuple) else ()


def _reasons(plugin: Any) -> list[str]:  # noqa: ANN401 - any plugin
    return [reason for need, reason in REASONS.items() if need in getattr(plugin, "needs", ())]
