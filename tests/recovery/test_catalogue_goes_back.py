"""Every plugin of the catalogue follows a run that returns to a snapshot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stablekit
from stablekit.snapshots import Snapshot
from stablekit.testing import TinyRun, factory_of
from stablekit_recovery import NonFiniteGuard

STAYS_LOWERED = "lr-backoff"
"""Keeps rates lowered for what comes again; tests/recovery/test_escalation.py."""
DRAWS_ANEW = "gradient-penalty"
"""Draws random points by the number of the step, which goes on as random numbers do."""
NUMBERS_STEPS = "spike-monitor"
"""Has numbers of steps in its state, which go on."""
FAULTS: dict[str, Any] = {"spike_at": (4, 9, 31), "nan_at": (2, 32), "none_at": (3, 30)}


def run_of(name: str, *, device_mode: bool) -> TinyRun:
    """Return a run with the plugin, behind a guard unless it is one."""
    plugin = factory_of(name)()
    chain = [plugin] if isinstance(plugin, NonFiniteGuard) else [NonFiniteGuard(), plugin]
    return TinyRun(
        *chain,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, fused=device_mode),
        device_mode=device_mode,
        **FAULTS,
    )


def learned(run: TinyRun) -> dict[str, Any]:
    """Return the state of the plugins that go back by loading what they had."""
    assert run.session is not None
    followers = [n for n, one in run.session.plugins.items() if not hasattr(one, "go_back")]
    return {name: run.plugin_state().get(name) for name in followers if name != NUMBERS_STEPS}


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "name", [n for n in stablekit.available() if n not in {STAYS_LOWERED, DRAWS_ANEW}]
)
def test_a_run_that_went_back_goes_on_as_one_that_never_went(name: str, device_mode: bool) -> None:
    run = run_of(name, device_mode=device_mode).go(6)
    assert run.session is not None
    snapshot = Snapshot.take(run.session)
    run.step = 30
    run.go(4)
    snapshot.restore()
    run.step = 6
    run.go(6)
    straight = run_of(name, device_mode=device_mode).go(12)
    for ours, theirs in zip(run.weights(), straight.weights(), strict=True):
        assert torch.equal(ours, theirs)
    assert str(learned(run)) == str(learned(straight))
