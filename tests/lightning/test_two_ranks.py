"""The callback under DDP and FSDP2: the same on every rank, and the same after a break."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch", reason="tests of the Lightning callback need lightning")

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_agree_and_resume_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    )
    assert first == second
    for kind in ("ddp", "fsdp2"):
        assert first[kind]["skipped"] == 1
        assert first[kind]["resumed"]
    assert first["fsdp2"]["weights"] == pytest.approx(first["ddp"]["weights"], rel=1e-4)
