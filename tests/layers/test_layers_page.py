"""What docs/layers.md says runs, and its table names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import stablekit_layers
from stablekit_layers import Foldable, Surgery

pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="ascii")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SURGERIES: list[Any] = [
    made()
    for name in stablekit_layers.__all__
    if hasattr(made := getattr(stablekit_layers, name), "apply_to") and made is not Surgery
]


def test_all_blocks_run_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "page", "folder": str(tmp_path)}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"layers.md, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "[{'name': 'qk-norm', 'arguments': {'eps': 1e-06, 'per': 'head'}}, " in printed
    assert "8 parameters were added" in printed
    assert "load it with stablekit_layers.load" in printed
    assert len(BLOCKS) == 6


def test_every_surgery_is_in_the_table_with_its_class_and_whether_it_folds() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|.*\| ([\w ]+) \|$", PAGE, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == {surgery.name for surgery in SURGERIES}
    for surgery in SURGERIES:
        [(kind, folds)] = [row[1:] for row in rows if row[0] == surgery.name]
        assert kind == type(surgery).__name__
        assert isinstance(surgery, Foldable) == (folds != "no")


def test_every_surgery_of_the_table_is_installed_by_its_name() -> None:
    assert {surgery.name for surgery in SURGERIES} <= set(stablekit_layers.available())
