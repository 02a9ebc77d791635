"""What was recorded survives the process, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablekit_monitors import read_run

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    """Run python with warnings as errors and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_killed_process_loses_the_last_rows_at_most(tmp_path: Path) -> None:
    lines = run("-m", "tests.monitors.killed_recordings", str(tmp_path), "0").splitlines()
    assert len(lines) == 8
    assert [line for line in lines if "fine" not in line] == []
    assert len(read_run(tmp_path / "unlimited")) > 100


END = """
import sys, torch, stablekit
from stablekit_monitors import Recorder, JSONLines, TensorBoard
p = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([p], lr=0.1)
plugins = [Recorder(sys.argv[1] + "/run"), JSONLines(sys.argv[1] + "/l.jsonl")]
stablekit.attach(optimizer, *plugins, TensorBoard(sys.argv[1] + "/board"))
for _ in range(5):
    p.grad = torch.ones(1)
    optimizer.step()
"""


@pytest.mark.parametrize("how", ["", "raise RuntimeError"])
def test_a_process_that_ends_without_detaching_loses_nothing(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(END + how)
    subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "script.py"), str(tmp_path)],
        check=how == "",
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    assert read_run(tmp_path / "run").steps.tolist() == [1, 2, 3, 4, 5]
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 5


def test_a_forked_child_leaves_the_record_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        END
        + "import os\n"
        + "pid = os.fork()\n"
        + "if pid == 0: sys.exit(0)\n"
        + "os.waitpid(pid, 0)\n"
        + "from pathlib import Path\n"
        + "print(len(list(Path(sys.argv[1], 'run').glob('chunk-*'))))\n"
    )
    assert run(str(tmp_path / "script.py"), str(tmp_path)) == "0\n"
    assert read_run(tmp_path / "run").steps.tolist() == [1, 2, 3, 4, 5]
