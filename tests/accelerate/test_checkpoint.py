"""One process: save_state and load_state carry the session, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from stablekit import attach
from stablekit.errors import StateWarning
from tests.accelerate.loops import NAN, forget, prepared, train, weights

if TYPE_CHECKING:
    from pathlib import Path

CHAIN = ("nonfinite-guard", "autoclip:percentile=50", "adagc:warmup_steps=2")
GAINS = (1.0, 3.0, NAN, 0.5, 30.0, 1.0)


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_a_resumed_run_ends_with_the_same_bits(first: str, tmp_path: Path) -> None:
    straight = prepared(*CHAIN, first=first)
    train(straight, *GAINS, limit=2.0)
    straight.accelerator.save_state(tmp_path)
    train(straight, *GAINS, limit=2.0)
    forget()
    resumed = prepared(*CHAIN, first=first)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.session.number == len(GAINS)
    train(resumed, *GAINS, limit=2.0)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert repr(resumed.session.state_dict()) == repr(straight.session.state_dict())


def test_the_state_is_in_the_file_of_the_optimizer_and_in_no_other(tmp_path: Path) -> None:
    kit = prepared("zclip")
    train(kit, 1.0)
    kit.accelerator.save_state(tmp_path)
    saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    assert saved["stablekit"]["number"] == 1
    assert not list(tmp_path.glob("stablekit*"))


def test_a_checkpoint_of_a_run_without_stablekit_is_loaded_and_said_to_be(tmp_path: Path) -> None:
    kit = prepared("zclip")
    kit.session.detach()
    train(kit, 1.0)
    kit.accelerator.save_state(tmp_path)
    forget()
    fresh = prepared("zclip")
    with pytest.warns(StateWarning, match="holds no stablekit state"):
        fresh.accelerator.load_state(tmp_path)
    train(fresh, 1.0)


def test_a_checkpoint_is_loaded_by_a_run_without_the_adapter(tmp_path: Path) -> None:
    kit = prepared("zclip")
    train(kit, 1.0)
    kit.accelerator.save_state(tmp_path)
    forget()
    fresh = prepared("zclip", attach=lambda _, *given, **more: attach(*given, **more))
    fresh.accelerator.load_state(tmp_path)
    assert fresh.session.number == 1
