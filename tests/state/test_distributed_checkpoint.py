"""torch.distributed.checkpoint: a session saved by two ranks goes on alike on one and on four."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful

import stablekit
from stablekit.checkpoint import SessionState
from stablekit.errors import StateError, StateWarning
from tests.state.resharded import FIRST, READERS, SAVED, STEPS, names
from tests.state.resumable import set_gradients, small_model

ROOT = Path(__file__).resolve().parents[2]
Seen = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return what each rank of each world saw after the checkpoint; world 0 had no break."""
    folder = tmp_path_factory.mktemp("resharded")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.state.resharded", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = {0: 2, **{world: world for world in READERS}}
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(count)]
        for world, count in ranks.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("world", READERS)
@pytest.mark.parametrize("name", names())
def test_another_number_of_ranks_goes_on_with_the_same_decisions(
    name: str, world: int, worlds: Seen
) -> None:
    straight = worlds[0][0][name]
    assert "failed" not in straight, straight["failed"]
    assert len(straight["metrics"]) == STEPS - SAVED
    assert straight["counts"][0] == STEPS - FIRST  # the step with which DCP makes state is none
    for rank in worlds[world]:
        ours = rank[name]
        assert "failed" not in ours, ours["failed"]
        assert ours["counts"] == straight["counts"]
        assert decisions(ours) == decisions(straight)
        for mine, theirs in zip(ours["metrics"], straight["metrics"], strict=True):
            either = set(mine) ^ set(theirs)
            assert either <= {"grad_norm_clipped"}  # after an edit it would cost a reduction
            assert without(mine, either) == pytest.approx(
                without(theirs, either), rel=1e-6, abs=1e-6, nan_ok=True
            )
        torch.testing.assert_close(ours["weights"], straight["weights"], rtol=1e-6, atol=1e-7)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [0, 4])
def test_all_ranks_end_with_the_same_bits(world: int, worlds: Seen) -> None:
    first, *others = worlds[world]
    for other in others:
        for name, ours in working(first).items():
            assert repr(ours["metrics"]) == repr(other[name]["metrics"])
            assert torch.equal(ours["weights"], other[name]["weights"])


@pytest.mark.distributed
def test_the_checkpointed_runs_had_something_to_decide(worlds: Seen) -> None:
    runs = working(worlds[0][0])
    assert all(run["counts"][2] >= 3 for run in runs.values())  # NaN, Inf and an overflow
    clipped = {name for name, run in runs.items() if any(map(has_clipped, run["metrics"]))}
    assert {"zclip", "adagc", "autoclip", "quantile-clip"} <= clipped


def without(metrics: dict[str, float], names: set[str]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key not in names}


def working(runs: dict[str, Any]) -> dict[str, Any]:
    """Leave out what another test complains of."""
    return {name: run for name, run in runs.items() if "failed" not in run}


def has_clipped(metrics: dict[str, float]) -> bool:
    return any(value > 0 for key, value in metrics.items() if key.endswith("/clipped"))


def decisions(run: dict[str, Any]) -> Any:  # noqa: ANN401 - plain values
    """Return what a run decided, without the values that only nearly agree."""
    told = [(e["kind"], e["step"], e["plugin"], e["tensors"]) for e in run["events"]]
    return told, [has_clipped(metrics) for metrics in run["metrics"]]


def trained(*plugins: str, steps: int = 9) -> stablekit.Session:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    session = stablekit.attach(optimizer, *plugins, model=model)
    for step in range(1, steps + 1):
        set_gradients(model, step)
        optimizer.step()
    return session


def test_it_is_what_torch_calls_stateful_and_holds_one_value() -> None:
    state = SessionState(trained("autoclip"))
    assert isinstance(state, Stateful)
    (value,) = state.state_dict().values()
    saved = torch.load(io.BytesIO(value), weights_only=True)
    assert saved["number"] == 9


def test_a_session_given_to_torch_itself_is_refused_when_saved(tmp_path: Path) -> None:
    # It would be saved, and only the process that resumes would see that it cannot be loaded.
    with (
        pytest.warns(UserWarning, match="torch.distributed is disabled"),
        pytest.raises(StateError, match=r"SessionState\(session\)"),
    ):
        save({"session": trained("autoclip")}, checkpoint_id=tmp_path, no_dist=True)


def test_a_longer_history_than_the_loading_session_has_is_restored_whole() -> None:
    session, fresh = trained("autoclip", steps=30), trained("autoclip", steps=0)
    SessionState(fresh).load_state_dict(SessionState(session).state_dict())
    history = fresh.state_dict()["plugins"]["autoclip"]["state"]["history"]
    assert torch.equal(history, session.state_dict()["plugins"]["autoclip"]["state"]["history"])
    assert len(history) > 20


def test_a_state_of_other_plugins_is_refused_unless_asked_otherwise() -> None:
    saved, other = SessionState(trained("zclip")).state_dict(), trained("adagc", steps=0)
    with pytest.raises(StateError, match="strict=False"):
        SessionState(other).load_state_dict(saved)
    with pytest.warns(StateWarning, match="dropped, not attached now: zclip"):
        SessionState(other, strict=False).load_state_dict(saved)


@pytest.mark.parametrize("bad", [{}, {"session": {"number": 1}}, {"session": 3}])
def test_something_else_than_it_saved_is_refused(bad: dict[str, Any]) -> None:
    session = trained("zclip")
    with pytest.raises(StateError, match=r"SessionState.state_dict\(\)"):
        SessionState(session).load_state_dict(bad)
    assert session.number == 9
