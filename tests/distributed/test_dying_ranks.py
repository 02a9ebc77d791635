"""When a rank is gone, torch's own error ends the others; stablekit neither waits nor hides it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.dying import LAST, PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

    Told = dict[tuple[str, str], dict[str, Any]]

pytestmark = pytest.mark.distributed

CASES = [("dies", "norms"), ("stalls", "norms"), ("dies", "loss")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Return what the ranks that stayed say, by how the others left and what they shared."""
    folders = {case: tmp_path_factory.mktemp("-".join(case)) for case in CASES}
    ranks = {case: [_rank(i, folders[case], *case) for i in range(2)] for case in CASES}
    said = {case: [one.communicate(timeout=200)[1] for one in ranks[case]] for case in CASES}
    for case, folder in folders.items():
        assert (folder / "told.json").exists(), "\n".join(said[case])
    return {case: json.loads((folders[case] / "told.json").read_text()) for case in CASES}


def _rank(number: int, folder: Path, how: str, what: str) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.dying", str(number), str(folder), how, what],
        env={**os.environ, **quiet},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("case", CASES)
def test_the_others_fail_in_the_same_step(told: Told, case: tuple[str, str]) -> None:
    assert told[case]["step"] == LAST
    assert told[case]["seconds"] < 10 * PATIENCE


@pytest.mark.parametrize(("how", "words"), [("dies", "Connection"), ("stalls", "Timed out")])
def test_the_error_is_torchs_own(told: Told, how: str, words: str) -> None:
    assert told[how, "norms"]["kind"] == "RuntimeError"
    assert words in told[how, "norms"]["message"]


def test_a_plugin_that_was_reading_then_names_the_error_of_torch(told: Told) -> None:
    seen = told["dies", "loss"]
    assert (seen["kind"], seen["cause"]) == ("PluginError", "RuntimeError")
    assert "Connection" in seen["message"]
