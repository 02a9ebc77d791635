"""The example that the README links to runs and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

ROOT = Path(__file__).parents[2]


def test_the_trainer_example_survives_its_poison(tmp_path: Path) -> None:
    script = ROOT / "examples" / "hf_trainer.py"
    paths = [ROOT, ROOT / "plugins", ROOT / "integrations", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    last = re.search(r"loss (\d\.\d\d), 3 skips", done.stdout)
    assert last is not None, done.stdout
    assert float(last.group(1)) < 3.3
    assert len(script.read_text().splitlines()) < 60
