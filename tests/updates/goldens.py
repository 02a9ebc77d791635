"""The inputs and outputs of the golden files of methods: one generator a file, drawn in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent.parent / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], Any]:
    """Return the inputs as float64 tensors, checked against the file's sums, and the outputs."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    generator = np.random.default_rng(content["seed"])
    inputs = {}
    for entry in content["inputs"]:
        shape = tuple(entry["shape"])
        if entry["kind"] == "normal":
            drawn = entry["scale"] * generator.standard_normal(shape) + entry["shift"]
        else:
            drawn = generator.uniform(entry["lo"], entry["hi"], shape)
        assert np.isclose(drawn.sum(), entry["check"]["sum"]), entry["name"]
        inputs[entry["name"]] = torch.from_numpy(drawn)
    return inputs, content["outputs"]
