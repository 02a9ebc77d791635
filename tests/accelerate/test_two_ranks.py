"""DDP and FSDP2 by Accelerate: one decision on all ranks, that of a loop without stablekit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.accelerate.loops import adamw, loss_of, network, weights
from tests.accelerate.two_ranks import (
    CASES,
    LIMIT,
    MICRO,
    ORACLE,
    RESUMED,
    SAVED,
    STEPS,
    WORLD,
    gain,
)

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return what each rank saw of all cases, which one pair of processes runs."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.accelerate.two_ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def by_hand() -> tuple[list[float], torch.Tensor]:
    """Train in one process on the batches of all ranks, clip with torch, skip what is NaN."""
    model = network()
    optimizer, norms = adamw(model), []
    for step in range(STEPS):
        for micro in range(MICRO):
            for rank in range(WORLD):
                number = (step * MICRO + micro) * WORLD + rank
                loss = loss_of(model, number, gain(step, micro, rank))
                torch.autograd.backward(loss / (MICRO * WORLD))
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        optimizer.zero_grad()
    return norms, weights(model)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.chain == ORACLE])
def test_it_trains_as_a_loop_in_one_process_that_skips_nan(name: str, ranks: Seen) -> None:
    norms, reached = by_hand()
    straight = ranks[0]["cases"][name]["straight"]
    steps = straight["steps"]
    assert [s["returned"] for s in steps] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert [s["grad_norm"] for s in steps] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert [s["skipped"] for s in steps] == [float(math.isnan(norm)) for norm in norms]
    torch.testing.assert_close(straight["weights"], reached, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_on_every_number(name: str, ranks: Seen) -> None:
    first, second = (rank["cases"][name]["straight"] for rank in ranks)
    assert repr(first["steps"]) == repr(second["steps"])
    assert first["state"] == second["state"]
    assert torch.equal(first["weights"], second["weights"])
    assert first["steps"][-1]["steps_skipped"] == 2  # each for a NaN of one rank


def test_the_order_and_the_engine_make_no_difference(ranks: Seen) -> None:
    seen = {name: ranks[0]["cases"][name]["straight"] for name in CASES}
    assert torch.equal(seen["ddp"]["weights"], seen["ddp, attach first"]["weights"])
    assert torch.equal(seen["fsdp2"]["weights"], seen["fsdp2, attach first"]["weights"])
    torch.testing.assert_close(
        seen["fsdp2"]["weights"], seen["ddp"]["weights"], rtol=1e-5, atol=1e-6
    )
    for mine, theirs in zip(seen["fsdp2"]["steps"], seen["ddp"]["steps"], strict=True):
        shared = mine.keys() & theirs.keys()  # the loss rides along where tensors are cut
        assert mine.keys() ^ theirs.keys() <= {"loss"}
        assert {key: mine[key] for key in shared} == pytest.approx(
            {key: theirs[key] for key in shared}, rel=1e-5, nan_ok=True
        )


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name: str, rank: int, ranks: Seen) -> None:
    seen = ranks[rank]["cases"][name]
    straight, resumed = seen["straight"], seen["resumed"]
    assert seen["number"] == SAVED
    assert torch.equal(resumed["weights"], straight["weights"])
    assert resumed["state"] == straight["state"]
    assert repr(resumed["steps"]) == repr(straight["steps"][SAVED:])
    assert seen["files"] == ([] if CASES[name].engine == "ddp" else ["stablekit.bin"])


def test_parameters_have_the_names_of_the_model(ranks: Seen) -> None:
    names = {name for name, _ in network().named_parameters()}
    for seen in ranks[1]["cases"].values():
        assert {culprit for told in seen["straight"]["culprits"] for culprit in told} == names


def test_only_the_main_process_logs(ranks: Seen) -> None:
    main, other = ranks
    assert main["lines"] > 0
    assert other["lines"] == 0
    for name in CASES:
        assert main["cases"][name]["pages"] == STEPS
        assert other["cases"][name]["pages"] == 0
