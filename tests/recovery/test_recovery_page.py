"""What docs/recovery.md says runs, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import stablekit_recovery
from stablekit_recovery import Escalation, LRBackoff, NonFiniteGuard, Rollback, SkipSpikes

PAGE = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text(encoding="ascii")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_every_block_runs_by_itself(number: int) -> None:
    assert len(BLOCKS) == 4
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(BLOCKS[number], f"recovery.md, block {number}", "exec"), namespace)
    if number == 0:
        assert namespace["session"].number == 20


def test_every_plugin_of_the_package_is_in_the_first_table() -> None:
    plugins: list[Any] = [NonFiniteGuard(), SkipSpikes(), LRBackoff(), Rollback(), Escalation()]
    assert {type(plugin).__name__ for plugin in plugins} == {
        name for name in stablekit_recovery.__all__ if name[0].isupper()
    }
    for plugin in plugins:
        assert f"| `{plugin.name}` |" in PAGE


def test_every_kind_of_event_is_in_the_table() -> None:
    sources = Path(stablekit_recovery.__file__).parent.glob("*.py")
    text = "".join(path.read_text(encoding="ascii") for path in sources)
    kinds = set(re.findall(r'emit\(\s*"([\w-]+)"', text)) | {"skip"}
    assert kinds == set(re.findall(r"^\| `([\w-]+)` \| [\w, -]+ \| ", PAGE, flags=re.MULTILINE))
