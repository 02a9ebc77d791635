"""``stablekit watch``: one picture, a growing run, Ctrl-C, small terminals."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import stablekit
from stablekit_cli.watch._frame import Pulse, frame
from stablekit_cli.watch._plot import Line, Plot, dots
from stablekit_monitors import Recorder
from tests.cli.runs import made_up_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

    from stablekit_monitors import RunLog


PULSE = Pulse(12.5, 3.0)


def drawn(
    run: RunLog, *, width: int, height: int = 30, ascii_only: bool = False, pulse: Pulse = PULSE
) -> str:
    console = Console(
        width=width, height=height, file=io.StringIO(), color_system=None, legacy_windows=False
    )
    options = console.options.update(width=width)
    if ascii_only:
        options = options.copy()
        options.encoding = "ascii"
    picture = frame("runs/a", run, pulse, last=0, height=height)
    lines = console.render_lines(picture, options)
    return "\n".join("".join(part.text for part in line).rstrip() for line in lines)


def _record(folder: Path, steps: int) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.125)
    with stablekit.attach(optimizer, "zclip", Recorder(folder), model=layer) as session:
        for _ in range(steps):
            loss = layer(torch.ones(1, 3)).square().sum()
            loss.backward()
            session.observe(loss=loss)
            optimizer.step()


def test_picture_has_the_last_values_thresholds_and_events() -> None:
    run = made_up_run()
    text = drawn(run, width=100)

    for part in (
        "runs/a", "step 300", "12.5 steps/s", "written 3 s ago", "1 step skipped", "2 spikes",
        "lr 0.1", f"loss  {run.scalars['loss'][-1]:.4g}",
        f"norm {run.scalars['grad_norm'][-1]:.4g}",
        f"zclip/threshold {run.scalars['zclip/threshold'][-1]:.4g}", "zclip  clipped 1.3% of steps",
        "255 skip blocks.0.norm2.weight not finite",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize("height", [10, 24, 60])
def test_no_line_is_wider_than_the_terminal(width: int, height: int) -> None:
    lines = drawn(made_up_run(), width=width, height=height).splitlines()

    assert max(map(len, lines)) <= width
    if height >= 24:
        assert len(lines) <= height


def test_terminal_without_unicode_gets_plain_signs() -> None:
    assert drawn(made_up_run(), width=60, ascii_only=True).isascii()
    assert not drawn(made_up_run(), width=60).isascii()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun_can_bedrawn(steps: int) -> None:
    assert "runs/a" in drawn(made_up_run(steps, spikes=(), nan_at=()), width=60)


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=80),
    rows=st.integers(2, 12),
    columns=st.integers(2, 40),
)
def test_every_value_has_its_dot(values: list[float], rows: int, columns: int) -> None:
    grid = dots(np.array(values), (rows, columns))

    edges = np.linspace(0, len(values), columns + 1).astype(int)
    for index, value in enumerate(values):
        column = int(np.searchsorted(edges, index, side="right")) - 1
        assert grid[round((1 - value) * (rows - 1)), column]


def test_missing_values_leave_gaps() -> None:
    grid = dots(np.array([0.5, np.nan, np.nan, 0.5]), (3, 4))

    assert grid.sum(axis=0).tolist() == [1, 0, 0, 1]


def test_plot_labels_its_scale() -> None:
    console = Console(width=40, file=io.StringIO(), color_system=None)
    console.print(Plot([Line(np.array([1.0, 250.0]), "")], 4, log=True))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO

    assert lines[0].split()[0] == "250"
    assert lines[3].split()[0] == "1"


def test_once_prints_one_picture(run: Callable[..., Result], tmp_path: Path) -> None:
    _record(tmp_path / "run", 5)
    done = run("watch", tmp_path / "run", "--once")

    assert done.exit_code == 0, done.output
    assert "step 5 " in done.stdout
    assert "lr 0.125" in done.stdout


def test_once_without_a_run_is_an_error(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("watch", tmp_path / "none", "--once")

    assert done.exit_code == 2
    assert "no run" in done.stderr


def test_watch_waits_for_a_run_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    code = "import stablekit_cli, sys; sys.argv[0] = 'stablekit'; stablekit_cli.main()"
    command = [sys.executable, "-c", code, "watch", str(tmp_path / "run"), "--every", "0.1"]
    watching = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, close_fds=True)
    os.close(theirs)
    _read_until(ours, b"waiting for a run")
    _record(tmp_path / "run", 7)
    _read_until(ours, b"step 7 ")
    watching.send_signal(signal.SIGINT)
    rest = _read_until(ours, None)

    assert watching.wait(timeout=60) == 0
    assert b"step 7 " in rest
    assert b"Traceback" not in rest
    os.close(ours)


def _read_until(descriptor: int, wanted: bytes | None) -> bytes:
    """Return what a terminal shows until it shows this, or to its end."""
    shown = b""
    while wanted is None or wanted not in shown:
        ready, _, _ = select.select([descriptor], [], [], 60)
        assert ready, shown
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux: nobody holds the other end any more
            part = b""
        if not part:
            assert wanted is None, shown
            return shown
        shown += part
    return shown
