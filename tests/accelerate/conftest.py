"""Every test has an Accelerate of its own: its state belongs to the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("accelerate", reason="tests of stablekit_accelerate need accelerate")

from tests.accelerate.loops import forget

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    forget()
    yield
    forget()
