"""Classes that are masked out, at -inf or the lowest number there is, under LogitClip."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from stablekit_logits import LogitClipLoss, clip_logits

LOWEST = [-torch.inf, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("masked", LOWEST)
@pytest.mark.parametrize("tau", [2.0, 20.0])
def test_a_masked_class_changes_nothing_for_the_others(masked: float, tau: float) -> None:
    label = torch.tensor([0])
    logits = torch.tensor([[5.0, masked, 1.0]], requires_grad=True)
    others = torch.tensor([[5.0, 1.0]], requires_grad=True)
    criterion = LogitClipLoss(tau=tau)
    criterion(logits, label).backward()
    criterion(others, label).backward()
    assert logits.grad is not None
    assert others.grad is not None
    torch.testing.assert_close(criterion(logits, label), criterion(others, label))
    torch.testing.assert_close(logits.grad[:, [0, 2]], others.grad)
    assert logits.grad[0, 1] == 0


def test_a_row_below_tau_has_the_plain_loss_beside_a_masked_class() -> None:
    logits, label = torch.tensor([[5.0, -torch.inf, 1.0]]), torch.tensor([2])
    assert LogitClipLoss(tau=20.0)(logits, label) == cross_entropy(logits, label)


def test_a_high_power_does_not_overflow() -> None:
    clipped = clip_logits(torch.tensor([[10.0, -3.0, 0.0, 2.0]]), 1.0, p=40)
    torch.testing.assert_close(clipped, torch.tensor([[1.0, -0.3, 0.0, 0.2]]))
