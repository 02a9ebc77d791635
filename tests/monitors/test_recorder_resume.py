"""A run that goes on from a checkpoint goes on in its folder; another run does not mix with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import stablekit
from stablekit.errors import PluginError, StablekitWarning
from stablekit.testing import NanGuard
from stablekit_monitors import Recorder, RunLog, read_run

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


class Run:
    """A run whose gradient norm is the step's number, with a mark of its own in the loss."""

    def __init__(self, folder: Path, mark: float, **options: Any) -> None:  # noqa: ANN401 - the recorder's
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([("p", self.p)], lr=0.0)
        self.recorder = Recorder(folder, **options)
        self.session = stablekit.attach(self.optimizer, NanGuard(), self.recorder)
        self.mark = mark

    def go(self, until: int, *, bad: tuple[int, ...] = ()) -> Run:
        while self.session.number < until:
            number = self.session.number + 1
            self.p.grad = torch.full((1,), torch.nan if number in bad else float(number))
            self.session.observe(loss=self.mark)
            self.optimizer.step()
        return self

    def load(self, checkpoint: dict[str, Any]) -> Run:
        self.optimizer.load_state_dict(checkpoint)
        return self

    def end(self) -> None:
        self.session.detach()


def check_rows(log: RunLog, marks: dict[int, float]) -> None:
    """Require one row a step, in order, from the run whose mark is given for it."""
    assert log.steps.tolist() == sorted(marks)
    np.testing.assert_array_equal(log.scalars["loss"], [marks[step] for step in sorted(marks)])
    np.testing.assert_array_equal(log.norms[:, 0], sorted(marks))
    assert set(log.stride) == {1}


@pytest.mark.parametrize("chunk", [3, 1024])
def test_steps_done_again_replace_those_recorded_before(tmp_path: Path, chunk: int) -> None:
    first = Run(tmp_path, 1.0, chunk=chunk).go(5)
    checkpoint = first.optimizer.state_dict()
    first.go(10)
    first.end()
    second = Run(tmp_path, 2.0, chunk=chunk).load(checkpoint).go(8)
    second.end()
    check_rows(read_run(tmp_path), {**dict.fromkeys(range(1, 6), 1.0), 6: 2.0, 7: 2.0, 8: 2.0})
    third = Run(tmp_path, 3.0, chunk=chunk).load(second.optimizer.state_dict() | checkpoint)
    third.go(6).end()
    check_rows(read_run(tmp_path), {**dict.fromkeys(range(1, 6), 1.0), 6: 3.0})


def test_a_run_that_goes_back_in_the_same_process_is_read_as_it_went_on(tmp_path: Path) -> None:
    run = Run(tmp_path, 1.0, chunk=4).go(3)
    state = run.session.state_dict()
    run.go(6, bad=(5,))
    run.session.load_state_dict(state)
    run.mark = 2.0
    run.go(5, bad=(4,))
    run.end()
    log = read_run(tmp_path)
    assert log.scalars["loss"].tolist() == [1, 1, 1, 2, 2]
    assert log.ok.tolist() == [True, True, True, False, True]
    assert [event.step for event in log.events if event.kind == "skip"] == [4]


def test_events_of_steps_done_again_are_replaced_too(tmp_path: Path) -> None:
    first = Run(tmp_path, 1.0).go(5, bad=(2, 5))
    checkpoint = first.optimizer.state_dict()
    first.go(10, bad=(7, 8))
    first.end()
    Run(tmp_path, 2.0).load(checkpoint).go(10, bad=(9,)).end()
    log = read_run(tmp_path)
    assert [event.step for event in log.events if event.kind == "skip"] == [2, 5, 9]
    (resumed,) = [event for event in log.events if event.kind == "recorder-resumed"]
    assert (resumed.step, resumed.message.partition(";")[0]) == (6, "the run goes on with step 6")


def test_the_start_of_the_run_stays_in_the_header(tmp_path: Path) -> None:
    first = Run(tmp_path, 1.0).go(2)
    checkpoint = first.optimizer.state_dict()
    first.end()
    header = tmp_path / "run.json"
    header.write_text(header.read_text().replace('"started": "', '"started": "was '))
    header.write_text(header.read_text().replace('"torch": "', '"torch": "was '))
    Run(tmp_path, 2.0).load(checkpoint).go(4).end()
    after = read_run(tmp_path).header
    assert after["started"].startswith("was ")
    assert after["torch"] == torch.__version__


def test_a_resumed_run_without_a_record_begins_there(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", 1.0).go(5)
    Run(tmp_path / "other", 2.0).load(first.optimizer.state_dict()).go(7).end()
    check_rows(read_run(tmp_path / "other"), {6: 2.0, 7: 2.0})
    assert read_run(tmp_path / "other").events == []


def test_a_run_from_the_start_moves_the_one_before_aside(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a part of it")
    Run(tmp_path, 1.0, chunk=2).go(5, bad=(3,)).end()
    for mark, number in ((2.0, 1), (3.0, 2)):
        with pytest.warns(StablekitWarning, match=f"record of another run.*earlier-{number}"):
            Run(tmp_path, mark).go(4).end()
    check_rows(read_run(tmp_path / "earlier-2"), dict.fromkeys(range(1, 5), 2.0))
    earlier = read_run(tmp_path / "earlier-1")
    assert earlier.steps.tolist() == [1, 2, 3, 4, 5]
    assert {event.step for event in earlier.events} == {3}
    assert notes.exists()
    assert sorted(path.name for path in (tmp_path / "earlier-2").iterdir()) == [
        "chunk-00000001.npz",
        "run.json",
    ]


def test_a_run_that_recorded_nothing_is_not_kept(tmp_path: Path) -> None:
    Run(tmp_path, 1.0, every=3).go(1).end()
    Run(tmp_path, 2.0).go(2).end()
    check_rows(read_run(tmp_path), {1: 2.0, 2: 2.0})
    assert not (tmp_path / "earlier-1").exists()


def test_two_runs_at_the_same_time_do_not_write_into_one_folder(tmp_path: Path) -> None:
    first = Run(tmp_path, 1.0, chunk=2).go(2)
    with pytest.warns(StablekitWarning, match="earlier-1"):
        second = Run(tmp_path, 2.0, chunk=2).go(2)
    with pytest.raises(PluginError, match="is recorded into by another process since"):
        first.go(4)
    first.end()
    second.go(4).end()
    check_rows(read_run(tmp_path), dict.fromkeys(range(1, 5), 2.0))


def test_a_checkpoint_says_nothing_about_where_the_record_is(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", 1.0).go(2)
    assert first.session.state_dict()["plugins"]["recorder"]["state"] == {}
    Run(tmp_path / "other", 2.0).load(first.optimizer.state_dict()).go(3).end()
