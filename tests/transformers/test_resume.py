"""Resuming: bit-identical after a kill, loud where state is missing, harmless without stablekit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

from stablekit.errors import StateWarning
from stablekit_transformers import StableKitCallback
from tests.transformers.equip import MODES, equipped
from tests.transformers.resume_worker import CASES, SAVED
from tests.transformers.tiny import trainer

ROOT = Path(__file__).parents[2]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which a worker has left what each run ended with."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [ROOT, ROOT / "plugins", ROOT / "integrations", os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "tests.transformers.resume_worker", str(folder)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.DEVNULL,
    )
    return folder


def assert_same(left: Any, right: Any, path: str = "") -> None:  # noqa: ANN401 - nested plain values
    """Assert that two nested structures hold the same bits; NaN is NaN."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert set(left) == set(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left.isnan(), right.isnan()), path
        assert torch.equal(left.nan_to_num(), right.nan_to_num()), path
    else:
        assert left == right or (left != left and right != right), f"{path}: {left} {right}"


@pytest.mark.parametrize(("mode", "chain"), CASES)
def test_a_killed_run_resumes_bit_identical(mode: str, chain: str, runs: Path) -> None:
    folder = runs / f"{mode}-{chain}"
    assert (folder / "killed.signal").read_text() == str(int(signal.SIGKILL))
    assert not (folder / "killed.pt").exists()
    straight, resumed = (
        torch.load(folder / f"{run}.pt", weights_only=True) for run in ("straight", "resumed")
    )
    assert resumed["first"] == SAVED
    assert len(straight["session"]["events"]) >= 4
    for part in ("model", "optimizer", "session", "log"):
        assert_same(straight[part], resumed[part], part)


def test_a_long_history_is_not_in_the_json_of_the_trainer(runs: Path) -> None:
    out = runs / "callback-guard-autoclip" / "out" / f"checkpoint-{SAVED}"
    kept = json.loads((out / "trainer_state.json").read_text())["stateful_callbacks"]
    assert set(kept["stablekit"]["attributes"]) == {"run", "output_dir"}


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_written_without_stablekit_is_resumed_with_it(
    mode: str, tmp_path: Path
) -> None:
    trainer(tmp_path, **SAVING, max_steps=2).train()
    made, callback = equipped(mode, tmp_path, "zclip", **SAVING)
    with pytest.warns(StateWarning):
        made.train(resume_from_checkpoint=True)
    assert callback.session.number == 2
    again, callback = equipped(mode, tmp_path, "zclip", **SAVING, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert callback.session.number == 4


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_written_with_stablekit_is_resumed_without_it(
    mode: str, tmp_path: Path
) -> None:
    equipped(mode, tmp_path, "zclip", **SAVING, max_steps=2)[0].train()
    made = trainer(tmp_path, **SAVING)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 4
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert "stablekit" not in saved


@pytest.mark.parametrize(("before", "after"), [("callback", "attach"), ("attach", "callback")])
def test_both_ways_of_attaching_read_the_same_checkpoints(
    before: str, after: str, tmp_path: Path
) -> None:
    equipped(before, tmp_path, "zclip", **SAVING, max_steps=2)[0].train()
    made, callback = equipped(after, tmp_path, "zclip", **SAVING)
    made.train(resume_from_checkpoint=True)
    assert callback.session.number == 4


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_another_output_dir_is_found(mode: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    equipped(mode, old, "zclip", **SAVING, max_steps=2)[0].train()
    equipped(mode, new, "zclip", **SAVING, max_steps=2)[0].train()  # same step, another run
    made, callback = equipped(mode, new, "zclip", **SAVING)
    want = torch.load(old / "checkpoint-2" / "optimizer.pt", weights_only=True)["stablekit"]
    got: list[Any] = []
    callback_begin = callback.on_train_begin

    def on_train_begin(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as the callback's
        callback_begin(*args, **kwargs)
        got.append(callback.session.state_dict())

    callback.on_train_begin = on_train_begin  # type: ignore[method-assign]
    made.train(resume_from_checkpoint=str(old / "checkpoint-2"))
    assert_same(got[0], want)


def test_a_moved_checkpoint_is_found_where_the_arguments_say(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "checkpoint-2"
    equipped("callback", old, "zclip", **SAVING, max_steps=2)[0].train()
    shutil.copytree(old / "checkpoint-2", new)
    shutil.rmtree(old)
    made, callback = equipped(
        "callback", tmp_path / "new", "zclip", resume_from_checkpoint=str(new)
    )
    made.train(resume_from_checkpoint=str(new))
    assert callback.session.number == 4


def test_a_moved_checkpoint_that_nobody_points_to_is_a_warning(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "checkpoint-2"
    equipped("callback", old, "zclip", **SAVING, max_steps=2)[0].train()
    shutil.copytree(old / "checkpoint-2", new)
    shutil.rmtree(old)
    made, callback = equipped("callback", tmp_path / "new", "zclip")
    with pytest.warns(StateWarning, match=r"attach\(trainer"):
        made.train(resume_from_checkpoint=str(new))
    assert callback.session.number == 2


def test_with_the_trainer_in_hand_a_moved_checkpoint_needs_no_pointing(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "checkpoint-2"
    equipped("attach", old, "zclip", **SAVING, max_steps=2)[0].train()
    shutil.copytree(old / "checkpoint-2", new)
    shutil.rmtree(old)
    made, callback = equipped("attach", tmp_path / "new", "zclip")
    made.train(resume_from_checkpoint=str(new))
    assert callback.session.number == 4


@pytest.mark.parametrize("mode", MODES)
def test_the_same_trainer_can_go_back_to_its_checkpoint(mode: str, tmp_path: Path) -> None:
    made, callback = equipped(mode, tmp_path, "zclip", **SAVING)
    made.train()
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.session.number == 4


def test_state_lies_beside_a_checkpoint_without_optimizer_pt(tmp_path: Path) -> None:
    """FSDP writes its optimizer elsewhere, and without our key."""
    made, first = equipped("callback", tmp_path, "zclip", **SAVING, max_steps=2)
    made.train()
    folder = tmp_path / "checkpoint-2"
    held = torch.load(folder / "optimizer.pt", weights_only=True)
    (folder / "optimizer.pt").unlink()
    first.on_save(made.args, made.state, made.control)
    held.pop("stablekit")
    torch.save(held, folder / "optimizer.bin")
    shutil.copy(folder / "optimizer.bin", folder / "optimizer.pt")
    made, callback = equipped("callback", tmp_path, "zclip", **SAVING)
    made.train(resume_from_checkpoint=True)
    assert callback.session.number == 4


def test_a_callback_of_other_plugins_says_what_starts_afresh(tmp_path: Path) -> None:
    equipped("callback", tmp_path, "zclip", **SAVING, max_steps=2)[0].train()
    made = trainer(tmp_path, callbacks=[StableKitCallback("zclip", "adagc")], **SAVING)
    with pytest.warns(StateWarning, match="start afresh, not in the checkpoint: adagc"):
        made.train(resume_from_checkpoint=True)
