"""A run log can be read at any moment, and what is no run log is said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stablekit import Event
from stablekit.errors import StablekitWarning
from stablekit.testing import NanGuard, TinyRun
from stablekit_monitors import Recorder, RunReader, read_run
from stablekit_monitors._record.event_file import EventFile, read_events


def recorded(path: Path, steps: int, *, chunk: int = 2, nan_at: tuple[int, ...] = ()) -> TinyRun:
    return TinyRun(NanGuard(), Recorder(path, chunk=chunk), nan_at=nan_at).go(steps)


def end(run: TinyRun) -> None:
    assert run.session is not None
    run.session.detach()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no recorded run: there is no run\.json in it"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing: it is not a folder"):
        RunReader(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is damaged"),
        ("[]", "must be of format 1, got None"),
        ('{"format": 2}', "must be of format 1, got 2"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_run_without_rows_yet_is_read_as_one_of_none(tmp_path: Path) -> None:
    run = recorded(tmp_path, 1)
    log = read_run(tmp_path)
    assert len(log) == 0
    assert log.norms.shape == log.present.shape == (0, 4)
    assert (log.scalars, log.events) == ({}, [])
    end(run)


def test_rows_of_a_header_that_lost_its_names_are_refused(tmp_path: Path) -> None:
    end(recorded(tmp_path, 4))
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, "names": ["0.weight"]}))
    with pytest.raises(ValueError, match="does not name all tensors"):
        read_run(tmp_path)


def test_a_reader_follows_a_run_and_reads_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    run = recorded(tmp_path, 4, nan_at=(1, 4))
    reader = RunReader(tmp_path)
    first = reader.update()
    assert reader.update() is first
    run.go(1)
    second = reader.update()
    assert (len(first), len(second)) == (4, 4)
    assert [event.step for event in second.events] == [2, 2, 5, 5]
    run.go(1)
    assert reader.update().steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert read == [f"chunk-0000000{n}.npz" for n in (1, 2, 3)]
    end(run)


def test_a_reader_notices_that_another_run_took_the_folder(tmp_path: Path) -> None:
    end(recorded(tmp_path, 6, nan_at=(2,)))
    reader = RunReader(tmp_path)
    assert len(reader.update()) == 6
    with pytest.warns(StablekitWarning, match="earlier-1"):
        end(recorded(tmp_path, 2))
    log = reader.update()
    assert (log.steps.tolist(), log.events) == ([1, 2], [])


def test_a_reader_follows_thinning(tmp_path: Path) -> None:
    run = TinyRun(Recorder(tmp_path, chunk=16, max_bytes=70_000))
    run.go(16)
    reader = RunReader(tmp_path)
    for _ in range(30):
        run.go(20)
        log, fresh = reader.update(), read_run(tmp_path)
        np.testing.assert_array_equal(log.steps, fresh.steps)
        np.testing.assert_array_equal(log.norms, fresh.norms)
        assert log.stride.sum() == log.steps[-1]
    assert log.stride.max() > 1
    end(run)


@pytest.mark.parametrize("kept", [0, 10, 200, -1])
def test_a_damaged_file_costs_its_own_steps_only(tmp_path: Path, kept: int) -> None:
    end(recorded(tmp_path, 6))
    file = tmp_path / "chunk-00000002.npz"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.warns(StablekitWarning, match="chunk-00000002.npz is damaged.*left out"):
        log = read_run(tmp_path)
    assert log.steps.tolist() == [1, 2, 5, 6]


def test_an_unfinished_line_of_events_waits_for_its_end(tmp_path: Path) -> None:
    end(recorded(tmp_path, 4, nan_at=(1,)))
    reader, path = RunReader(tmp_path), tmp_path / "events.jsonl"
    before = reader.update().events
    line = json.dumps(Event("spike", 9, "later").as_dict()).encode()
    with path.open("ab", buffering=0) as file:
        file.write(line[:20])
        assert reader.update().events == before
        file.write(line[20:] + b"\n")
    assert reader.update().events == [*before, Event("spike", 9, "later")]


def test_a_damaged_line_of_events_is_left_out_loudly(tmp_path: Path) -> None:
    end(recorded(tmp_path, 4, nan_at=(1,)))
    path = tmp_path / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"kind": 3\n' + lines[1])
    with pytest.warns(StablekitWarning, match="a line is damaged"):
        log = read_run(tmp_path)
    assert [event.kind for event in log.events] == ["nonfinite", "skip"]


def test_numbers_that_json_does_not_know_come_back_from_events(tmp_path: Path) -> None:
    event = Event("x", 1, data={"a": [float("nan"), float("-inf")], "b": {"c": float("inf")}})
    file = EventFile(tmp_path / "events.jsonl")
    file.write(event)
    text = (tmp_path / "events.jsonl").read_text()
    json.loads(text, parse_constant=pytest.fail)
    (back,) = read_events(tmp_path / "events.jsonl")
    assert repr(back) == repr(event)
