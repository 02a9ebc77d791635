"""What the tests of the command line share: a runner that leaves torch as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from stablekit_cli._app import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typer.testing import Result


@pytest.fixture
def run() -> Iterator[Callable[..., Result]]:
    """Call ``stablekit`` with arguments, in this process."""
    threads = torch.get_num_threads()
    runner = CliRunner(env={"COLUMNS": "200"})

    def call(*arguments: Any) -> Result:  # noqa: ANN401 - anything with a str()
        return runner.invoke(app, [str(argument) for argument in arguments])

    yield call
    torch.set_num_threads(threads)
