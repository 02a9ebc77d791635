"""Which protections are compared: the names after ``--arms`` and what they stand for."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CLIP", "GUARD", "NONE", "PRESET", "Arm", "ArmError", "parse_arms", "plugin_name"]

NONE = "none"
CLIP = "clip"
GUARD = "nonfinite-guard"
PRESET = "recommended"
"""stablekit's preset; it brings its own guard."""


class ArmError(ValueError):
    """An arm that nobody knows; the message lists the known ones."""


@dataclass(frozen=True)
class Arm:
    """One column of the comparison."""

    label: str
    """As the user wrote it."""
    chain: tuple[str, ...] = ()
    """What is given to ``stablekit.wrap``, in order; empty for ``none`` and ``clip``."""

    @property
    def protected(self) -> bool:
        """Whether stablekit is attached, so that the arm has to survive."""
        return bool(self.chain)

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^\w.+=-]+", "-", self.label)

    def fitted(self, keywords: Mapping[str, str]) -> Arm:
        """Return the arm with keywords put in front of those that the user gave to a plugin.

        Example:
            >>> Arm("max-norm", ("max-norm:dim=1",)).fitted({"max-norm": "max_norm=2"}).chain
            ('max-norm:max_norm=2,dim=1',)
        """
        return replace(self, chain=tuple(_with(spec, keywords) for spec in self.chain))

    def describe(self) -> str:
        """Return what the arm does, for people."""
        if self.protected:
            return f"stablekit: {' + '.join(self.chain)}"
        return "torch clip_grad_norm_(1.0)" if self.label == CLIP else "no protection"


def parse_arms(text: str, plugins: Iterable[str], *, guard: bool = True) -> list[Arm]:
    """Return the arms of a comma-separated list.

    An arm is ``none``, ``clip`` or a chain of plugins joined with ``+``, each with its keywords as
    stablekit reads them. ``guard`` puts nonfinite-guard in front of a chain that has none.

    Raises:
        ArmError: A name is unknown or given twice, or the list is empty.

    Example:
        >>> known = ["autoclip", "global-norm"]
        >>> [arm.chain for arm in parse_arms("clip,global-norm+autoclip:percentile=50", known)]
        [(), ('nonfinite-guard', 'global-norm', 'autoclip:percentile=50')]
    """
    labels = _split(text)
    if not labels:
        raise ArmError(f"--arms is empty: give at least one of {NONE}, {CLIP} or a plugin")
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ArmError(f"--arms names {', '.join(sorted(twice))} twice")
    known = [NONE, CLIP, *plugins]
    return [_arm(label, known, guard) for label in labels]


def plugin_name(spec: str) -> str:
    """Return the plugin's name in a string like ``"zclip:z_thresh=3.0"``."""
    return spec.partition(":")[0].strip()


def _arm(label: str, known: list[str], guard: bool) -> Arm:
    if label in {NONE, CLIP}:
        return Arm(label)
    # A plus sign before a digit belongs to a number such as 1e+5.
    chain = tuple(part.strip() for part in re.split(r"\+(?!\d)", label))
    names = [plugin_name(part) for part in chain]
    for name in names:
        if name not in known or name in {NONE, CLIP}:
            raise ArmError(_unknown(name, label, known))
    if guard and not set(names) & {GUARD, PRESET}:
        chain = (GUARD, *chain)
    return Arm(label, chain)


def _split(text: str) -> list[str]:
    """Split at the commas between arms, not at those between the keywords of one plugin."""
    labels: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if labels and re.match(r"\w+\s*=", piece):
            labels[-1] += f",{piece}"
        elif piece:
            labels.append(piece)
    return labels


def _unknown(name: str, label: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else "."
    where = "" if name == label else f" in {label!r}"
    listed = ", ".join([*known[:2], *sorted(known[2:])])
    return (
        f"unknown arm {name!r}{where}{guess} Known: {listed}, with keywords as in "
        "autoclip:percentile=50 and chains joined with +"
    )


def _with(spec: str, keywords: Mapping[str, str]) -> str:
    name, _, own = spec.partition(":")
    given = [text for text in (keywords.get(name, ""), own) if text]
    return f"{name}:{','.join(given)}" if given else name
