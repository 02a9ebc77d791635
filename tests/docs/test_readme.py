"""The README says only what runs, and cannot fall behind the hooks and the catalogue."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stablekit
from stablekit import hookspecs
from stablekit.hookspecs import HOOKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_runs_by_itself(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # one of them records a run
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), namespace)


def test_every_hook_stands_there_with_its_exact_arguments() -> None:
    for name in HOOKS:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        assert f"`{name}({arguments})`" in README


def test_every_plugin_stands_there() -> None:
    for name in stablekit.available():
        assert f"| `{name}`<br>" in README


def test_every_hook_has_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in HOOKS:
        assert re.search(rf"def {name}\(", tests), f"no test implements {name}"


def test_generated_tables_are_up_to_date() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", "README.md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run: python -m cogapp -r README.md\n{result.stdout}"


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
