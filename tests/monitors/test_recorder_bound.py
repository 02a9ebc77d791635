"""A record stays within its limit: old rows are thinned, and say what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stablekit
from stablekit import Event
from stablekit.errors import StablekitWarning
from stablekit_monitors import Recorder, read_run
from stablekit_monitors._record.chunk import Chunk, current, join, thinned
from stablekit_monitors._record.header import EVENTS
from stablekit_monitors._record.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 100_000


def rows(first: int, count: int, *, tensors: int = 3, norm: float = 1.0) -> Chunk:
    steps = np.arange(first, first + count)
    return Chunk(
        steps=steps,
        stride=np.ones(count, np.int64),
        ok=np.ones(count, np.bool_),
        keys=("loss", "grad_norm"),
        scalars=np.column_stack([steps.astype(float), np.full(count, norm)]),
        norms=np.repeat(steps[:, None], tensors, axis=1).astype(np.float32),
        present=np.ones((count, tensors), np.bool_),
        columns=np.arange(tensors),
    )


def folder_of(
    path: Path, *, limit: int | None = LIMIT, rows: int = 100, first: int = 1
) -> RunFolder:
    about = {"started": "now", "plugins": {}}
    folder = RunFolder(path, about, rows=rows, max_bytes=limit, first=first)
    assert folder.columns({"a": [1], "b": [1], "c": [1]}).tolist() == [0, 1, 2]
    return folder


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.name != "run.json")


def test_200_000_steps_stay_within_the_limit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, limit=10 * LIMIT, rows=1000)
    peak, spikes = 0, []
    for first in range(1, 200_001, 1000):
        chunk = rows(first, 1000)
        if first % 10_000 == 1:
            spikes.append(first + 41)
            chunk.scalars[41, 1] = first
            folder.add_event(Event("spike", first + 41, "spike-monitor"))
        folder.add(chunk)
        peak = max(peak, size(tmp_path))
    assert 8 * LIMIT < peak <= 10 * LIMIT
    log = read_run(tmp_path)
    assert log.steps[-1] == 200_000
    assert (np.diff(log.steps) > 0).all()
    assert log.stride.sum() == 200_000
    np.testing.assert_array_equal(log.steps, np.cumsum(log.stride))
    np.testing.assert_array_equal(log.scalars["loss"], log.steps)
    np.testing.assert_array_equal(log.norms[:, 1], log.steps.astype(np.float32))
    assert set(spikes) <= set(log.steps.tolist())
    assert [event.step for event in log.events] == spikes
    assert (log.stride[-3000:] == 1).all()
    assert len(list(tmp_path.glob("*.part"))) == 0


def test_a_session_keeps_the_limit_too(tmp_path: Path) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    with stablekit.attach(optimizer, Recorder(tmp_path, max_bytes=70_000)):
        for step in range(1, 601):
            p.grad = torch.full((1,), float(step))
            optimizer.step()
    assert size(tmp_path) <= 70_000
    log = read_run(tmp_path)
    assert log.stride.sum() == log.steps[-1] == 600
    assert len(log) < 500
    np.testing.assert_array_equal(log.norms[:, 0], log.steps)


def test_without_a_limit_every_row_is_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, limit=None, rows=10)
    for first in range(1, 1001, 10):
        folder.add(rows(first, 10))
    assert read_run(tmp_path).steps.tolist() == list(range(1, 1001))


def test_events_have_a_quarter_of_the_limit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, limit=40_000)
    for step in range(1, 1001):
        folder.add_event(Event("spike", step, "spike-monitor", "x" * 20))
        assert (tmp_path / EVENTS).stat().st_size <= 10_000
    steps = [event.step for event in read_run(tmp_path).events]
    assert steps == sorted(steps)
    assert steps[-30:] == list(range(971, 1001))
    assert len(steps) > 60


def test_thinning_goes_on_after_a_resume(tmp_path: Path) -> None:
    for first in range(1, 20_001, 2000):
        folder = folder_of(tmp_path, first=first)
        for start in range(first, first + 2000, 100):
            folder.add(rows(start, 100))
        folder.close()
        assert size(tmp_path) <= LIMIT
    log = read_run(tmp_path)
    assert log.stride.sum() == 20_000
    levels = np.unique(log.stride)
    assert levels[0] == 1
    assert levels[-1] <= 64


def test_an_interrupted_merge_shows_no_row_twice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, limit=None)
    for first in (1, 101, 201):
        folder.add(rows(first, 100))
    second = tmp_path / "chunk-00000002.npz"
    kept = second.read_bytes()
    limited = folder_of(tmp_path, limit=size(tmp_path) - 1, first=301)
    limited.add(rows(301, 1))
    assert not second.exists()
    second.write_bytes(kept)  # as if killed before the second file of the pair was removed
    log = read_run(tmp_path)
    assert log.steps[log.steps > 100].tolist() == list(range(101, 302))
    assert (np.diff(log.steps) > 0).all()


def test_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, rows=10, limit=None)
    for first in range(1, 41, 10):
        folder.add(rows(first, 10))
    (tmp_path / "chunk-00000002.npz").write_bytes(b"PK nothing")
    with pytest.warns(StablekitWarning, match="chunk-00000002.npz is damaged"):
        again = folder_of(tmp_path, rows=10, limit=10_000, first=41)
    for first in range(41, 400, 10):
        again.add(rows(first, 10))
    assert (tmp_path / "chunk-00000002.npz").read_bytes() == b"PK nothing"
    with pytest.warns(StablekitWarning, match="its steps are left out"):
        log = read_run(tmp_path)
    assert log.stride.sum() == 390


def mixed(length: int, seed: int) -> tuple[Chunk, np.ndarray]:
    draw = np.random.default_rng(seed)
    chunk = rows(1, length)
    chunk.stride[:] = draw.integers(1, 5, length)
    chunk.steps[:] = np.cumsum(chunk.stride)
    chunk.ok[:] = draw.random(length) > 0.02
    chunk.scalars[:] = draw.lognormal(size=chunk.scalars.shape)
    chunk.scalars[draw.random(length) < 0.02, 1] = np.nan
    chunk.norms[draw.random(length) < 0.02, 1] = np.inf
    return chunk, draw.random(length) < 0.03


@given(st.integers(1, 400), st.integers(0, 10_000))
def test_thinned_rows_stand_for_all_steps(length: int, seed: int) -> None:
    chunk, marked = mixed(length, seed)
    thin = thinned(chunk, marked)
    assert thin.level == chunk.level + 1
    assert thin.steps[-1] == chunk.steps[-1]
    np.testing.assert_array_equal(np.cumsum(thin.stride), thin.steps)
    where = np.searchsorted(chunk.steps, thin.steps)
    np.testing.assert_array_equal(chunk.scalars[where], thin.scalars)
    np.testing.assert_array_equal(chunk.norms[where], thin.norms)
    assert len(thin) <= 0.5 * length + 2 * -(-length // 32) + max(length // 16, 1) + 1


@given(st.integers(32, 400), st.integers(0, 10_000))
def test_thinning_keeps_what_stands_out(length: int, seed: int) -> None:
    chunk, marked = mixed(length, seed)
    thin = set(thinned(chunk, marked).steps.tolist())
    for key in (0, 1):
        assert chunk.steps[np.nanargmax(chunk.scalars[:, key])] in thin
    special = marked | ~chunk.ok | ~np.isfinite(chunk.norms).all(axis=1)
    if special.sum() <= length // 16:
        assert set(chunk.steps[special].tolist()) <= thin


@given(st.lists(st.integers(1, 12), max_size=30))
def test_the_last_row_of_each_step_counts(numbers: list[int]) -> None:
    kept: list[int] = []
    for i, number in enumerate(numbers):
        kept = [j for j in kept if numbers[j] < number] + [i]
    chunk = rows(1, len(numbers))
    chunk.steps[:] = numbers
    assert (current(chunk).scalars[:, 0] - 1).tolist() == kept


def test_joined_chunks_know_all_tensors_and_metrics() -> None:
    first, second = rows(1, 2, tensors=2), rows(3, 1, tensors=1)
    object.__setattr__(first, "columns", np.array([0, 2]))
    object.__setattr__(second, "columns", np.array([1]))
    object.__setattr__(second, "keys", ("grad_norm", "lr"))
    both = join([first, second])
    assert both.columns.tolist() == [0, 1, 2]
    assert both.norms.tolist() == [[1, 0, 1], [2, 0, 2], [0, 3, 0]]
    assert both.present.tolist() == [[True, False, True]] * 2 + [[False, True, False]]
    assert both.keys == ("loss", "grad_norm", "lr")
    np.testing.assert_array_equal(both.scalars, [[1, 1, np.nan], [2, 1, np.nan], [np.nan, 3, 1]])
