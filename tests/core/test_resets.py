"""In device mode no reset of moments is lost, however late the host learns of skipped steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stablekit
from stablekit import moments
from stablekit.moments import Resets


class Troubled:
    """Skip the steps of these numbers, by a flag on the device."""

    name = "troubled"

    def __init__(self, *steps: int) -> None:
        """Note the steps."""
        self.steps = steps

    @stablekit.hookimpl
    def observe_gradients(self, step: stablekit.Step) -> None:
        """Skip."""
        step.skip("it is one of them", when=torch.tensor(step.number in self.steps))


class Resetting:
    """Clear moments every so many updates."""

    name = "resetting"
    needs = ("parameters",)

    def __init__(self, interval: int) -> None:
        """Make the schedule."""
        self.resets = Resets(interval, self.name)

    @stablekit.hookimpl
    def after_update(self, step: stablekit.Step) -> None:
        """Clear them if it is time."""
        if self.resets.is_due(step):
            self.resets.clear(step)

    @stablekit.hookimpl
    def on_skip(self, step: stablekit.Step) -> None:
        """Take it back."""
        self.resets.missed(step)


def resets_of(plugin: Resetting, skipped: tuple[int, ...], steps: int, **options: Any) -> list[int]:
    """Return in which steps moments became zero."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param], fused=True)
    stablekit.attach(optimizer, Troubled(*skipped), plugin, **options)
    found = []
    for number in range(1, steps + 1):
        param.grad = torch.ones(2)
        optimizer.step()
        is_zero = optimizer.state[param] and not optimizer.state[param]["exp_avg"].any()
        if is_zero and number not in skipped:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("skipped", "at", "last"),
    [
        # After step 7 the host learns that 3 and 6 did not count: 3 updates were made, none reset.
        ((3, 4, 5, 6), 8, 4),
        # The reset of step 3 did count, the one of step 6 did not.
        ((6,), 3, 3),
        # Step 6 did what step 3 could not.
        ((3,), 6, 6),
    ],
)
def test_only_resets_of_skipped_steps_are_taken_back(
    skipped: tuple[int, ...], at: int, last: int
) -> None:
    plugin = Resetting(3)
    steps = 8 if at == 8 else 7
    assert resets_of(plugin, skipped, steps, device_mode=True, log_every=7) == [at]
    assert plugin.resets.last == last


def test_what_the_host_never_hears_of_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_MOST_OPEN", 10)
    plugin = Resetting(1)
    resets_of(plugin, (), 30, device_mode=True, log_every=0)
    assert plugin.resets.last == 30
    assert len(plugin.resets._open) == 10


def test_in_host_mode_nothing_waits() -> None:
    plugin = Resetting(2)
    assert resets_of(plugin, (3,), 6) == [2, 5]
    assert plugin.resets.last == 4
    assert not plugin.resets._open
