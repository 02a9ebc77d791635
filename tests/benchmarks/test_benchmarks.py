"""The benchmarks run, and what they compare does the same thing. Nothing here looks at a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import stablekit

pytest.importorskip("zclip", reason="the extra bench is not installed")
pytest.importorskip("autoclip", reason="the extra bench is not installed")

from benchmarks.effort import Effort
from benchmarks.interleave import Case, interleave
from benchmarks.naive import accurate_norm, unit_wise_clip_
from benchmarks.suite import run_apart
from benchmarks.table import Row, markdown, plain, write_into
from benchmarks.workloads import GPT2, NORM, TINY, Tensors, free, shapes

if TYPE_CHECKING:
    from pathlib import Path


def test_a_quick_run_fills_the_rows() -> None:
    names = ("unclipped", "clipped", "agc", "adagc", "device")
    rows = run_apart(names, ("tiny",), 1, Effort(quick=True))
    assert {row.threads for row in rows} == {1}
    assert sum(row.target is not None for row in rows) == 2 + 2 + 1 + 1
    assert [row.ours for row in rows if row.unit == "reads"] == [0]
    assert all(row.what in plain(rows) and row.what in markdown(rows) for row in rows)


def test_workloads_have_the_tensors_of_gpt2() -> None:
    sizes = [torch.Size(shape).numel() for shape in shapes(GPT2)]
    assert (len(sizes), sum(sizes)) == (148, 124_439_808)
    assert sum(torch.Size(shape).numel() for shape in shapes(TINY)) == 729_472


def test_cases_take_turns_after_the_warmup() -> None:
    ran: list[str] = []
    cases = [Case(name, lambda name=name: ran.append(name)) for name in "ab"]  # type: ignore[misc]
    timings = interleave(cases, 2, warmup=1)
    assert "".join(ran) == "abbaab"
    assert timings.median("a") > 0
    assert timings.added("a", "a") == 0


def test_floor_is_the_norm() -> None:
    grads = Tensors(TINY).grads
    exact = torch.stack([grad.double().norm() for grad in grads]).norm()
    torch.testing.assert_close(accurate_norm(grads).double(), exact, rtol=1e-6, atol=0)
    assert exact.item() == pytest.approx(NORM, rel=1e-2)


def test_unit_wise_clip_is_what_agc_does() -> None:
    ours, theirs = Tensors(TINY), Tensors(TINY)
    stablekit.wrap(free(ours), "agc:clipping=0.004").step()
    unit_wise_clip_(theirs.params, 0.004)
    untouched = Tensors(TINY).grads
    assert any(not torch.equal(a, b) for a, b in zip(theirs.grads, untouched, strict=True))
    torch.testing.assert_close(ours.grads, theirs.grads)


def test_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table: begin -->old<!-- table: end -->\nb\n", encoding="utf-8")
    write_into(page, markdown([Row("x", 1.0, against="y", theirs=2.0, target=0.4)]))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    assert "old" not in text
    assert "| x |" in text
    assert "| 0.50 | 0.40 | NO |" in text


def test_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold"):
        write_into(page, "table")
