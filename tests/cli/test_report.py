"""``stablekit report``: what is in the file, and that thinning loses no spike."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stablekit
from stablekit import Event
from stablekit_cli.report._clipping import clipping_of
from stablekit_cli.report._curves import curves_of, kept_rows, medians
from stablekit_cli.report._events import kinds_of, marks_of, rows_of
from stablekit_cli.report._heat import decoded, heat_of
from stablekit_cli.report._verdict import verdict_on
from stablekit_cli.report._write import write_report
from stablekit_monitors import Recorder
from tests.cli.runs import made_up_run, transformer_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

    from stablekit_monitors import RunLog


class Addresses(HTMLParser):
    """Collects what a page would fetch or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value or "") for key, value in attrs if key in {"src", "href"}]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _page(run: RunLog, folder: Path, **options: Any) -> tuple[str, Addresses]:  # noqa: ANN401
    write_report(run, folder / "report.html", name="run", **options)
    text = (folder / "report.html").read_text("utf-8")
    parser = Addresses()
    parser.feed(text)
    return text, parser


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text, page = _page(made_up_run(), tmp_path, links=[("this", ""), ("other", "b/report.html")])

    assert page.found == [("a", "b/report.html")]
    assert page.policy.startswith("default-src 'none'; ")
    assert "@import" not in text


def test_every_script_is_allowed_by_its_hash_alone(tmp_path: Path) -> None:
    text, page = _page(made_up_run(), tmp_path)

    scripts = text.split("<script>")[1:]
    for script in scripts:
        digest = hashlib.sha256(script.partition("</script>")[0].encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in page.policy
    assert len(scripts) == 5
    assert "unsafe" not in page.policy


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    evil = "</script><b onclick='x()'>&amp;"
    run = made_up_run(names=(evil, *transformer_names(2)[1:]), culprit=0)
    text, page = _page(run, tmp_path)

    assert evil not in text
    assert evil in page.texts


@pytest.mark.parametrize(("steps", "tensors"), [(1_000, 148), (100_000, 148), (1_000_000, 4)])
def test_file_stays_small_at_any_length(tmp_path: Path, steps: int, tensors: int) -> None:
    block = made_up_run(1_000, [f"p{i}" for i in range(tensors)], spikes=(700,))
    run = _repeated(block, steps // 1_000)
    run = replace(run, events=[Event("spike", i, "", "", ("p3",)) for i in range(1, steps, 500)])
    text, _ = _page(run, tmp_path)

    assert len(text) < 3_000_000


def _repeated(block: RunLog, times: int) -> RunLog:
    return replace(
        block,
        steps=np.arange(1, len(block) * times + 1),
        scalars={key: np.tile(values, times) for key, values in block.scalars.items()},
        norms=np.tile(block.norms, (times, 1)),
        present=np.tile(block.present, (times, 1)),
        ok=np.tile(block.ok, times),
        stride=np.tile(block.stride, times),
    )


@given(
    values=st.lists(st.floats(allow_subnormal=False), min_size=1, max_size=400),
    buckets=st.integers(1, 30),
)
def test_thinned_rows_hold_the_extremes_of_every_stretch(values: list[float], buckets: int) -> None:
    series = np.array(values)
    kept = kept_rows([series], np.zeros(0, dtype=np.int64), buckets)

    assert (np.diff(kept) > 0).all()
    assert len(kept) <= max(2 * buckets, 4 * buckets + 1)
    edges = np.linspace(0, len(series), buckets + 1).astype(int)
    for start, stop in pairwise(edges):
        part, shown = series[start:stop], series[kept[(kept >= start) & (kept < stop)]]
        finite, drawn = part[np.isfinite(part)], shown[np.isfinite(shown)]
        if len(finite):
            assert (drawn.min(), drawn.max()) == (finite.min(), finite.max())
        assert np.isfinite(part).all() == np.isfinite(shown).all()


def test_rows_around_events_are_all_kept() -> None:
    run = made_up_run(50_000, ("a", "b", "c", "d"), spikes=(20_000,), nan_at=())
    curves = curves_of(run, [20_000])

    assert curves.thinned
    assert set(range(19_950, 20_051)) <= set(curves.steps.tolist())
    assert {line.label for line in curves.lines} == {
        "loss", "median", "gradient norm", "after clipping", "zclip threshold",
    }  # fmt: skip


def test_medians_are_those_of_their_stretches() -> None:
    values = np.arange(5000.0) % 100
    values[7] = math.inf
    rows = np.arange(5000)
    found = medians(values, rows)

    places = np.flatnonzero(np.isfinite(found))
    assert len(places) == 240
    assert found[places[0]] == np.median([v for v in values[:21] if v < math.inf])


@pytest.mark.parametrize("steps", [50, 4_000])
def test_table_of_norms_shows_the_largest_of_each_cell(steps: int) -> None:
    run = made_up_run(steps, transformer_names(4), spikes=(20,), nan_at=(33,))
    run.present[:, 5], run.norms[:, 5] = False, 0
    run.norms[40, 2] = math.inf
    run.norms[:, 7] = 0
    heat = heat_of(run)
    assert heat is not None
    found = decoded(heat)

    for column in range(found.shape[1]):
        norms = run.norms[column * heat.width : (column + 1) * heat.width].astype(np.float64)
        norms[:, 5] = -1
        np.testing.assert_allclose(found[:, column], norms.max(axis=0), rtol=1e-3)


def test_table_of_norms_fills_what_a_thinned_log_left_out() -> None:
    run = made_up_run(60, ("a", "b", "c", "d"), spikes=(), nan_at=())
    rows = np.array([3, 7, 9, *range(10, 60)])
    thinned = replace(
        run,
        steps=run.steps[rows],
        scalars={key: values[rows] for key, values in run.scalars.items()},
        norms=run.norms[rows],
        present=run.present[rows],
        ok=run.ok[rows],
        stride=np.diff(run.steps[rows], prepend=0),
    )
    heat = heat_of(thinned)
    assert heat is not None

    assert (heat.first, heat.width, heat.codes.shape[1]) == (1, 1, 60)
    found = decoded(heat)
    for step in range(1, 5):
        np.testing.assert_allclose(found[:, step - 1], run.norms[3], rtol=1e-3)
    np.testing.assert_allclose(found[:, 6], run.norms[7], rtol=1e-3)


def test_more_tensors_than_rows_are_shown_in_groups() -> None:
    run = made_up_run(10, [f"t{i}" for i in range(4000)], spikes=(), nan_at=())
    heat = heat_of(run)
    assert heat is not None

    assert len(heat.names) == heat.codes.shape[0] == 1334
    assert heat.names[1] == "t3 ... t5"
    np.testing.assert_allclose(
        decoded(heat)[1], run.norms[:, 3:6].astype(np.float64).max(axis=1), rtol=1e-3
    )


def test_clipping_is_counted_as_a_loop_would() -> None:
    run = made_up_run(nan_at=())
    (row,) = clipping_of(run)

    acted = [i for i in range(len(run)) if run.scalars["zclip/clipped"][i] > 0]
    factors = [run.scalars["zclip/factor"][i] for i in acted]
    assert row.plugin == "zclip"
    assert row.steps == len(acted) > 0
    assert row.share == len(acted) / len(run)
    assert row.factor == pytest.approx(sum(factors) / len(factors))
    assert row.smallest == min(factors)
    assert row.smallest_at == run.steps[acted[factors.index(min(factors))]]
    assert row.last_threshold == run.scalars["zclip/threshold"][-1]


@pytest.mark.parametrize(
    ("spikes", "nan_at", "level", "words"),
    [
        ((), (), "calm", ["No spikes and no steps skipped in 300 steps."]),
        ((120,), (), "survived", ["1 spike and", "The tensor behind it was blocks.0.norm2.weight"]),
        (
            (120, 210),
            (255,),
            "survived",
            ["2 spikes and 1 step skipped", "not finite at step 255", "first at 3 of 3 bad steps"],
        ),
    ],
)
def test_verdict_says_what_happened(
    spikes: tuple[int, ...], nan_at: tuple[int, ...], level: str, words: list[str]
) -> None:
    verdict = verdict_on(made_up_run(spikes=spikes, nan_at=nan_at))

    assert verdict.level == level
    for part in [*words, "The loss fell from 5."]:
        assert part in verdict.text


def test_a_run_that_ends_in_nan_is_lost() -> None:
    run = made_up_run(nan_at=(300,))
    run.ok[-1] = True

    assert verdict_on(run).level == "lost"
    assert verdict_on(run).text.endswith("ended with a gradient norm of nan.")


def test_of_too_many_events_the_first_and_last_of_each_kind_are_shown() -> None:
    events = [Event("nonfinite" if i == 4321 else "spike", i) for i in range(9000)]
    rows, marks = rows_of(events), marks_of(events)

    assert len(rows) <= 1000
    assert {(row.step, row.kind) for row in rows} >= {
        (0, "spike"),
        (8999, "spike"),
        (4321, "nonfinite"),
    }
    assert (4321, "nonfinite") in marks
    assert kinds_of(events) == [("spike", 8999), ("nonfinite", 1)]


def test_command_writes_into_the_run_and_tells_the_verdict(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with stablekit.attach(optimizer, "zclip", Recorder(tmp_path / "run"), model=layer):
        for _ in range(3):
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    done = run("report", tmp_path / "run")

    assert done.exit_code == 0, done.output
    assert "No spikes and no steps skipped in 3 steps." in done.stdout
    assert "stablekit report" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert run("report", tmp_path / "run", "--output", tmp_path / "o.html").exit_code == 0
    assert (tmp_path / "o.html").is_file()


def test_command_refuses_what_is_no_run(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("report", tmp_path / "nothing")

    assert done.exit_code == 2
    assert str(tmp_path / "nothing") in done.stderr
    assert run("report", tmp_path, "--output", tmp_path / "no" / "folder.html").exit_code == 2
