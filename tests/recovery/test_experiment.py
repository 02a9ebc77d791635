"""The script that shows where recovery helps runs; what it finds is not judged here."""

from __future__ import annotations

import math

import pytest

from benchmarks import recovery


@pytest.mark.parametrize("fault", recovery.FAULTS)
def test_every_chain_runs_with_every_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 8, "START": 4, "LONG": 2, "BATCH": 2, "CONTEXT": 8}.items():
        monkeypatch.setattr(recovery, name, value)
    source = recovery.data()
    for make in recovery.chains().values():
        assert math.isfinite(recovery.run(make(), fault, 0, source).loss)
