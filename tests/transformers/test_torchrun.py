"""A Trainer in two processes, under DDP and FSDP2: one decision, one log, one state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

from tests.transformers.two_ranks import CASES, FAULTS, RESUMED, SAVED, STEPS, WORLD

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return what each rank saw of all cases, which one pair of processes runs."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformers.two_ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "StateWarning" not in done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_a_nan_of_one_skips_on_both(name: str, ranks: Seen) -> None:
    first, second = (rank["cases"][name]["straight"] for rank in ranks)
    assert first["counts"] == [STEPS, STEPS - len(FAULTS), len(FAULTS)]
    assert first["sharded"] == name.startswith("fsdp2")
    assert repr(first["log"]) == repr(second["log"])
    assert first["state"] == second["state"]
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name: str, rank: int, ranks: Seen) -> None:
    seen = ranks[rank]["cases"][name]
    straight, resumed = seen["straight"], seen["resumed"]
    assert resumed["counts"][0] == STEPS > SAVED
    assert torch.equal(resumed["weights"], straight["weights"])
    assert resumed["state"] == straight["state"]
    assert repr(resumed["log"]) == repr(straight["log"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_up_to_the_first_fault_it_trains_as_a_trainer_without_stablekit(
    engine: str, ranks: Seen
) -> None:
    # max_grad_norm clips there, and here the plugin that takes its place.
    ours = ranks[0]["cases"][f"{engine}, guard"]["straight"]["log"]
    theirs = ranks[0]["stock"][f"{engine}, stock"]
    for mine, other in list(zip(ours, theirs, strict=True))[: min(FAULTS)]:
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert mine["grad_norm_clipped"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fsdp2")])
def test_the_loss_of_a_step_is_that_of_all_micro_batches_and_ranks(name: str, ranks: Seen) -> None:
    for entry in ranks[0]["cases"][name]["straight"]["log"][: min(FAULTS)]:
        assert entry["step_loss"] == pytest.approx(entry["loss"], rel=1e-4)


def test_both_ways_to_attach_and_both_engines_train_alike(ranks: Seen) -> None:
    reached = {name: ranks[0]["cases"][name]["straight"]["weights"] for name in RESUMED}
    for weights in reached.values():
        torch.testing.assert_close(weights, reached["ddp, attach"], rtol=1e-4, atol=1e-5)
    assert torch.equal(reached["ddp, callback"], reached["ddp, attach"])
    assert torch.equal(reached["fsdp2, callback"], reached["fsdp2 whole, attach"])


def test_culprits_have_the_names_of_the_model(ranks: Seen) -> None:
    for seen in ranks[1]["cases"].values():
        for named in seen["straight"]["culprits"]:
            assert "transformer.wte.weight" in named
            assert not any(name.startswith(("module.", "group")) for name in named)


def test_only_the_first_process_logs(ranks: Seen) -> None:
    assert ranks[0]["lines"] > 0
    assert ranks[1]["lines"] == 0


def test_fsdp1_is_refused(ranks: Seen) -> None:
    assert "torch.distributed.fsdp.fully_shard" in ranks[0]["fsdp1"]
