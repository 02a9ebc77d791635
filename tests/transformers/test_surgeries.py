"""A checkpoint of a model with surgeries is not resumed with another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers", reason="stablekit_transformers needs transformers")

import stablekit_layers
from stablekit.errors import StateError
from tests.transformers.equip import MODES, equipped
from tests.transformers.tiny import llama, trainer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}


def operated(*names: str) -> PreTrainedModel:
    return stablekit_layers.apply(llama(), *names)


# Without a state of plugins in the checkpoint they start afresh, as is said.
@pytest.mark.filterwarnings("ignore::stablekit.errors.StateWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_stablekit", [False, True])
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [(("qk-norm",), ()), ((), ("qk-norm",)), (("qk-norm",), ("qk-norm", "peri-ln"))],
)
def test_another_model_is_refused(
    mode: str, by_stablekit: bool, saved: tuple[str], resumed: tuple[str], tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {**SAVING, "max_steps": 2, "model": operated(*saved)}
    first = equipped(mode, tmp_path, **kinds)[0] if by_stablekit else trainer(tmp_path, **kinds)
    first.train()
    made, _ = equipped(mode, tmp_path, "zclip", model=operated(*resumed), **SAVING)
    with pytest.raises(StateError, match=r"surgeries .*this model has .*stablekit_layers.apply"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.filterwarnings("ignore::stablekit.errors.StateWarning")
@pytest.mark.parametrize("mode", MODES)
def test_the_same_model_is_resumed(mode: str, tmp_path: Path) -> None:
    names = ("qk-norm:per=projection", "peri-ln")
    equipped(mode, tmp_path, model=operated(*names), max_steps=2, **SAVING)[0].train()
    made, callback = equipped(mode, tmp_path, "zclip", model=operated(*names), **SAVING)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.session.number == 2
    assert made.state.global_step == 4


@pytest.mark.parametrize("mode", MODES)
def test_another_run_at_the_same_step_is_not_looked_at(mode: str, tmp_path: Path) -> None:
    changes = {**SAVING, "save_only_model": False}
    old, new = tmp_path / "old", tmp_path / "new"
    equipped(mode, old, model=llama(), max_steps=2, **changes)[0].train()
    equipped(mode, new, model=operated("qk-norm"), max_steps=2, **changes)[0].train()
    made, callback = equipped(mode, new, model=llama(), **changes)
    made.train(resume_from_checkpoint=str(old / "checkpoint-2"))
    assert callback.session.number == 4
