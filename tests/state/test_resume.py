"""A run resumed in a new process ends with the same bits as one that was not interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-m", "tests.state.resumable", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_plugin_resumes_bit_by_bit_in_a_new_process(tmp_path: Path) -> None:
    # From seven steps of a run with faults, in both modes; also under the names that torch.compile
    # and DistributedDataParallel give to parameters.
    run("save", str(tmp_path))
    assert run("resume", str(tmp_path)) == ""
