"""What docs/logits.md says runs, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stablekit_logits import (
    ErrorNormTruncation,
    GradientPenalty,
    LogitClip,
    SoftCap,
    ZLoss,
    lowest_loss,
)

PAGE = (Path(__file__).parents[2] / "docs" / "logits.md").read_text(encoding="ascii")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
PLUGINS: list[Any] = [
    ZLoss(),
    SoftCap(),
    LogitClip(),
    ErrorNormTruncation(1.2, warmup_steps=1),
    GradientPenalty(),
]


def test_all_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"logits.md, block {number}", "exec"), namespace)
    assert namespace["session"].number == 20
    assert namespace["watched"].number == 3
    assert namespace["loss"] > 0
    assert namespace["noisy"] > 0
    clipped, slope = map(float, capsys.readouterr().out.split())
    assert 0 <= clipped <= 1
    assert slope > 0


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_every_plugin_is_in_both_tables(plugin: Any) -> None:  # noqa: ANN401 - any plugin
    assert PAGE.count(f"\n| `{plugin.name}` |") == 2


def test_the_floor_of_logit_clip_is_what_is_said() -> None:
    assert f"{lowest_loss(1.5, 50257):.1f} nats is the least" in PAGE
