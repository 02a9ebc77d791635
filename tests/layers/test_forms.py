"""What a surgery may be given as, and what stands for none."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from stablekit_layers import PeriNorm, QKNorm, apply
from tests.layers.models import llama


def test_mappings_lists_and_entries_of_a_configuration_stand_for_surgeries() -> None:
    chosen = QKNorm(per="projection"), PeriNorm(embedding=False)
    expected = apply(llama(), *chosen)
    listed = [{"qk-norm": {"per": "projection"}}, "peri-ln:embedding=false"]
    entries = expected.config.stablekit_surgery
    for forms in ((listed,), listed, (tuple(listed),), entries, (entries,)):
        assert apply(llama(), *forms).config.stablekit_surgery == entries
    assert apply(llama(), {"qk-norm": None}).config.stablekit_surgery[0]["name"] == "qk-norm"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"qk-norm": {}, "peri-ln": {}}, "one entry.* a list of mappings"),
        ({"qk-norm": 3}, "arguments of surgery 'qk-norm' must be a mapping, got 3"),
        ({"name": "qk-norm", "arguments": [1]}, r"must be a mapping, got \[1\]"),
    ],
)
def test_malformed_mappings_are_refused(form: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=words):
        apply(llama(), form)


def test_forms_that_stand_for_no_surgery_are_refused() -> None:
    with pytest.raises(TypeError, match=r"write QKNorm\(\.\.\.\)"):
        apply(llama(), QKNorm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="given as an instance, as 'name'"):
        apply(llama(), 3)  # type: ignore[arg-type]
