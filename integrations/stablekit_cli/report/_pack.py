"""What the charts draw, as JSON that may stand inside a script element."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from stablekit_cli.report import _heat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stablekit_cli.report._curves import Curves
    from stablekit_cli.report._heat import Heat

__all__ = ["packed"]


def packed(
    curves: Curves,
    heat: Heat | None,
    marks: Sequence[tuple[int, str]],
    spans: Sequence[tuple[int, int]] = (),
) -> str:
    """Return the JSON; ``<``, ``>`` and ``&`` are escaped, so that no text can end the element."""
    content = {
        "steps": _bytes(curves.steps, "<f8"),
        "lines": [{**asdict(line), "values": _bytes(line.values, "<f4")} for line in curves.lines],
        "marks": marks,
        "spans": spans,
        "heat": None if heat is None else _table(heat),
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _table(heat: Heat) -> dict[str, Any]:
    return {
        "names": heat.names,
        "first": heat.first,
        "width": heat.width,
        "columns": heat.codes.shape[1],
        "low": heat.low,
        "high": heat.high,
        "codes": _bytes(heat.codes, "<u2"),
        "code": {
            key: getattr(_heat, key) for key in ("ABSENT", "ZERO", "FIRST", "LAST", "INF", "NAN")
        },
    }


def _bytes(values: NDArray[Any], kind: str) -> str:
    with np.errstate(over="ignore"):  # a loss beyond float32 is drawn as a gap
        return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
