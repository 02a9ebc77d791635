"""Every program in ``examples/``: short, linked from the README, and it runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPERIMENT = ROOT / "examples" / "four_bit_llama.py"


def packages(example: Path) -> set[str]:
    """Return the packages that a program imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def launcher(example: Path) -> list[str]:
    """Return what comes before the program where its docstring says torchrun."""
    if "torchrun --nproc_per_node 2" not in example.read_text(encoding="utf-8"):
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_there_is_an_example_for_each_way_to_train() -> None:
    names = {example.stem for example in EXAMPLES}
    assert names >= {
        "accelerate_fsdp2",
        "hf_trainer",
        "lightning_trainer",
        "plain_loop",
        "trl_sft",
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_read_at_a_glance(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_hides_a_package_of_its_own_name(example: Path) -> None:
    # Its folder comes first on the path of the program: `import lightning` in lightning.py ...
    assert importlib.util.find_spec(example.stem) is None


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_readme_links_to_an_example(example: Path) -> None:
    assert f"(examples/{example.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def run(example: Path, folder: Path, *arguments: str) -> str:
    """Return what a program printed."""
    missing = sorted(p for p in packages(example) if importlib.util.find_spec(p) is None)
    if missing:
        pytest.skip(f"{example.name} needs {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, *launcher(example), str(example), *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",  # the tests share the machine
            "HF_HUB_OFFLINE": "1",  # and nothing is downloaded
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e != EXPERIMENT], ids=lambda path: path.stem
)
def test_an_example_runs_and_prints_what_the_plugins_did(example: Path, tmp_path: Path) -> None:
    printed = run(example, tmp_path)
    assert re.search(r"[1-9]\d* skipped", printed)
    assert "zclip" in printed
    assert "bit-identical after resuming: False" not in printed


def test_the_experiment_prints_a_loss_for_each_arm_and_rate(tmp_path: Path) -> None:
    printed = run(EXPERIMENT, tmp_path, "2", "1")
    rows = re.findall(r"lr (\S+)  (\S.*?)  +(\d\.\d+) \+- 0\.000", printed)
    arms = [(lr, arm) for lr in ("0.001", "0.003") for arm in ("Adam", "Adam + stable-spam")]
    assert [(lr, arm) for lr, arm, _ in rows] == arms
