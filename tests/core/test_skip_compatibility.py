"""A skipped step leaves the optimizers of pytorch_optimizer bit-identical, and we publish which."""

from __future__ import annotations

import pytest

pytest.importorskip("pytorch_optimizer")

from tests.core import skip_compatibility


def test_skipped_step_leaves_at_least_107_optimizers_bit_identical_and_the_list_is_published() -> (
    None
):
    idle, trained = skip_compatibility.survey()
    assert len(trained) >= 110
    assert [reason for reason in trained.values()].count("") >= 107
    assert skip_compatibility.PAGE.read_text() == skip_compatibility.page(idle, trained), (
        "run python -m tests.core.skip_compatibility"
    )
