"""The data of the demo is a frozen list of files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from stablekit_cli.demo._corpus import CorpusError, freeze

if TYPE_CHECKING:
    from pathlib import Path


def _library(root: Path, compiled: str | None = "lib-dynload/fast.so") -> Path:
    for number in range(4):
        (root / f"source{number}.py").write_text(f"value = {number}\n" * 500)
    (root / "short.py").write_text("pass\n")
    if compiled is not None:
        (root / compiled).parent.mkdir(exist_ok=True)
        (root / compiled).write_bytes(bytes(range(256)) * 32)
    return root


def test_hash_is_the_same_at_every_call() -> None:
    first, second = freeze(), freeze()

    assert first == second
    assert first.sha256 == second.sha256
    assert f"sha256 {first.sha256}" in first.describe()


def test_this_python_has_sources_compiled_files_and_held_out_sources() -> None:
    corpus = freeze()

    assert corpus.sources
    assert corpus.compiled
    assert not set(corpus.sources) & set(corpus.held_out)


def test_hash_follows_the_content(tmp_path: Path) -> None:
    library = _library(tmp_path)
    before = freeze(library).sha256
    (library / "source1.py").write_text("value = 9\n" * 500)

    assert freeze(library).sha256 != before


def test_file_that_changes_after_the_freeze_is_refused(tmp_path: Path) -> None:
    library = _library(tmp_path)
    corpus = freeze(library)
    (library / "lib-dynload" / "fast.so").write_bytes(b"other" * 2000)

    with pytest.raises(CorpusError, match="changed since"):
        corpus.compiled[0].read()


def test_compiled_files_are_found_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    library = _library(tmp_path, compiled="__pycache__/source0.pyc")

    assert [file.path.name for file in freeze(library).compiled] == ["source0.pyc"]


def test_missing_files_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))

    with pytest.raises(CorpusError, match=r"no \.py files"):
        freeze(tmp_path)
    with pytest.raises(CorpusError, match="no compiled files"):
        freeze(_library(tmp_path, compiled=None))
