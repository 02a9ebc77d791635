"""JSONLines writes whole lines of strict JSON, and adds to what is there."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from stablekit import Event
from stablekit.testing import CHECKS, Factory, NanGuard, TinyRun
from stablekit_monitors import JSONLines
from stablekit_monitors._lines import LineFile, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def strict(path: Path) -> list[dict[str, Any]]:
    """Read lines as any strict parser would."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None]) -> None:
    check(JSONLines.example)


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_every_log_point_and_every_event_is_a_line(tmp_path: Path, device_mode: bool) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    run = TinyRun(
        NanGuard(), JSONLines(path), nan_at=(1,), log_every=2, device_mode=device_mode
    ).go(4)
    lines = strict(path)
    assert run.session is not None
    metrics = [line for line in lines if "event" not in line]
    events = [line for line in lines if "event" in line]
    assert [line["step"] for line in metrics] == [2, 4]
    assert [(line["event"], line["step"]) for line in events] == [("nonfinite", 2), ("skip", 2)]
    assert events[0]["tensors"] == ["0.weight"]
    assert events[0]["data"] == {"kind": "nan", "count": 1}
    assert metrics[0]["grad_norm"] == "NaN"
    expected = {key: pytest.approx(value) for key, value in run.session.metrics().items()}
    last = {key: value for key, value in metrics[-1].items() if key not in {"step", "time"}}
    assert last == expected
    assert lines == sorted(lines, key=lambda line: line["time"])
    run.session.detach()


def test_a_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run = TinyRun(JSONLines(path))
    for step in range(1, 4):
        run.go(1)
        assert [line["step"] for line in strict(path)] == list(range(1, step + 1))


def test_a_second_run_adds_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        run = TinyRun(JSONLines(path)).go(2)
        assert run.session is not None
        run.session.detach()
    assert [line["step"] for line in strict(path)] == [1, 2, 1, 2]


@pytest.mark.parametrize("length", [0, 1, 70_000, 200_000])
def test_a_line_that_was_cut_short_is_cut_off(tmp_path: Path, length: int) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b'"'[:length] + b"x" * (length - 1))
    LineFile(path).write({"step": 2})
    assert strict(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("before", ["", "{}\n", '{"whole": 1}', '{"first": 1', "x" * 70_000])
def test_only_what_is_no_json_is_cut_off(tmp_path: Path, before: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(before)
    LineFile(path).write(2)
    whole = [{}] if before == "{}\n" else [{"whole": 1}] if "whole" in before else []
    assert strict(path) == [*whole, 2]


def test_numbers_that_json_does_not_know_are_words() -> None:
    values = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan, "NaNs")}}
    text = encode(values)
    assert text == '{"a": "NaN", "b": ["Infinity", "-Infinity", 1.5], "c": {"d": ["NaN", "NaNs"]}}'
    back = decode(text)
    assert math.isnan(back["a"])
    assert back["b"] == [math.inf, -math.inf, 1.5]
    assert [float(word) for word in json.loads(text)["b"][:2]] == [math.inf, -math.inf]


def test_what_json_does_not_know_at_all_becomes_text(tmp_path: Path) -> None:
    event = Event("x", 1, data={"batch": {3: tmp_path}})
    data = json.loads(encode(event.as_dict()))["data"]
    assert data == {"batch": {"3": str(tmp_path)}}


def test_it_can_be_named_on_a_command_line(tmp_path: Path) -> None:
    TinyRun(f"jsonl:path={tmp_path}/run.jsonl").go(2)
    assert [line["step"] for line in strict(tmp_path / "run.jsonl")] == [1, 2]


def test_a_path_is_required() -> None:
    with pytest.raises(TypeError, match="path must be a string or a path, got None"):
        JSONLines(None)  # type: ignore[arg-type]  # that is the mistake
