"""``include`` and ``exclude`` name the layers whose weights are standardised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn
from torch.nn.utils import parametrize

from stablekit.errors import AttachError
from stablekit_layers import ScaledWeightStandardization, apply, fold, no_decay
from stablekit_layers.scaled_ws import StandardizedWeight

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": ["1.*", "2"]}, ["1.0", "2"]),
        ({"exclude": "2"}, ["0", "1.0"]),
        ({"exclude": ["0", "1"]}, ["2"]),
        ({"include": ["*.*", "0"], "exclude": ["1.0"]}, ["0"]),
    ],
)
def test_lists_and_exclude_name_layers_too(arguments: Any, expected: list[str]) -> None:  # noqa: ANN401
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Linear(4, 2))
    surgery = ScaledWeightStandardization(**arguments)
    apply(model, surgery)
    found = [name for name, m in model.named_modules() if parametrize.is_parametrized(m, "weight")]
    assert found == expected
    assert json.loads(json.dumps(surgery.arguments)) == surgery.arguments
    fold(model)
    assert not any(parametrize.is_parametrized(one) for one in model.modules())


def test_exclude_names_layers_of_the_whole_model_which_saves_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.layers import contract
    from tests.layers.models import llama

    surgery = ScaledWeightStandardization(exclude=["model.layers.*.mlp", "model.layers.0.*.q_proj"])
    model = apply(llama(), surgery)
    changed = [m for m in model.modules() if isinstance(m, StandardizedWeight)]
    assert len(changed) == 2 * 4 - 1
    contract.saved_and_loaded_it_is_the_same(model, surgery, tmp_path)


def test_a_tied_head_is_left_out_as_the_refusal_says() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=61
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(
        AttachError, match=r"one weight.*leave this layer out with exclude='lm_head'"
    ):
        apply(model, ScaledWeightStandardization())
    apply(model, ScaledWeightStandardization(exclude="lm_head"))
    assert model.lm_head.weight is model.shared.weight
    assert len(no_decay(model)) == 4 + 8 + 2 * 2


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(AttachError, match="exclude='head' matches no module"):
        apply(nn.Sequential(nn.Linear(2, 2)), ScaledWeightStandardization(exclude="head"))
    with pytest.raises(AttachError, match="no linear layer left by exclude"):
        apply(nn.Sequential(nn.Linear(2, 2)), ScaledWeightStandardization(exclude="0"))
    with pytest.raises(TypeError, match="include must be a string, a list of strings or None"):
        ScaledWeightStandardization(include=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude must be a string, a list of strings or None"):
        ScaledWeightStandardization(exclude=[3])  # type: ignore[list-item]
