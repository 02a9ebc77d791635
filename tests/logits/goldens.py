"""The inputs and outputs of the golden files of methods on logits, edits included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent.parent / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], Any, float]:
    """Return the inputs, checked against the file's sums, the outputs, and the tolerance."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    generator = np.random.default_rng(content["seed"])
    inputs = {}
    for entry in content["inputs"]:
        drawn = _draw(generator, entry)
        assert np.isclose(drawn.sum(), entry["check"]["sum"]), entry["name"]
        inputs[entry["name"]] = torch.from_numpy(drawn)
    for edit in filter(None, re.split(r";\s*", content.get("post", ""))):
        _apply(inputs, edit)
    return inputs, content["outputs"], content["tol"]


def far(found: Tensor, expected: Any) -> float:  # noqa: ANN401 - nested lists
    """Return the largest ``|a - b| / (1 + |b|)``."""
    target = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == target.shape
    return float(((found.double() - target).abs() / (1 + target.abs())).max())


def _draw(generator: np.random.Generator, entry: dict[str, Any]) -> Any:  # noqa: ANN401 - an array
    shape = tuple(entry["shape"])
    if entry["kind"] == "normal":
        return entry["scale"] * generator.standard_normal(shape) + entry["shift"]
    draw = generator.integers if entry["kind"] == "integers" else generator.uniform
    return draw(entry["lo"], entry["hi"], shape)


def _apply(inputs: dict[str, Tensor], edit: str) -> None:
    found = re.fullmatch(r"(\w+)\[(\d+)\]\s*(\*?=)\s*(\S+)", edit.strip())
    assert found, edit
    name, row, sign, value = found.groups()
    if sign == "=":
        inputs[name][int(row)] = float(value)
    else:
        inputs[name][int(row)] *= float(value)
