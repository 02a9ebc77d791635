"""The files of the running Python installation, chosen, read and hashed once: the frozen data."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Corpus", "CorpusError", "File", "freeze"]

SOURCES = 90
COMPILED = 10
HELD_OUT = 15
SMALLEST = 4096
LARGEST = 2**21
COMPILED_SUFFIXES = (".so", ".pyd", ".dylib", ".dll", ".pyc")


class CorpusError(RuntimeError):
    """This Python installation does not have the files that the demo trains on."""


@dataclass(frozen=True)
class File:
    """A file as it was when the list was frozen."""

    path: Path
    name: str
    size: int
    sha256: str

    def read(self) -> bytes:
        """Return the content; it must still be what was frozen."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CorpusError(f"{self.path} changed since the list of files was frozen: run again")
        return content


@dataclass(frozen=True)
class Corpus:
    """The frozen list: sources and compiled files to train on, sources that are held out."""

    sources: tuple[File, ...]
    compiled: tuple[File, ...]
    held_out: tuple[File, ...]

    @property
    def files(self) -> tuple[File, ...]:
        """Every file of the list."""
        return (*self.sources, *self.compiled, *self.held_out)

    @property
    def sha256(self) -> str:
        """Hash over the names, sizes and hashes of all files, in their order."""
        lines = "".join(f"{file.name} {file.size} {file.sha256}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def describe(self) -> str:
        """Return the line that is printed with every result."""
        total = sum(file.size for file in self.files)
        return (
            f"{len(self.files)} files of Python {sys.version.split()[0]}: {len(self.sources)} "
            f"sources and {len(self.compiled)} compiled to train on, {len(self.held_out)} sources "
            f"held out; {total:,} bytes; sha256 {self.sha256}"
        )


def freeze(library: Path | None = None) -> Corpus:
    """Choose and hash the files below ``library`` (default: the standard library of this Python).

    Raises:
        CorpusError: There are no source files, or no compiled ones.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    sources = _fitting(library.glob("*.py"))
    compiled = _compiled(library)
    if len(sources) < 2:
        raise CorpusError(
            f"found no .py files of at least {SMALLEST:,} bytes in {library}: the workload shards "
            "trains on the standard library; use a Python that has it as files, or --workload "
            "digits"
        )
    if not compiled:
        raise CorpusError(
            f"found no compiled files ({', '.join(COMPILED_SUFFIXES)}) for {library}: the "
            "workload shards needs them as dirty data; try --workload rnn"
        )
    held_out = _spread(sources, min(HELD_OUT, len(sources) // 2))
    train = [path for path in sources if path not in set(held_out)]
    chosen = (_spread(train, SOURCES), compiled, held_out)
    return Corpus(*(tuple(_file(path, library) for path in paths) for paths in chosen))


def _compiled(library: Path) -> list[Path]:
    """Return compiled files, from as few of the usual places as give enough of them."""
    places = (
        (library / "lib-dynload").glob("*"),
        (Path(sys.base_prefix) / "DLLs").glob("*"),
        library.rglob("*.so"),
        (library / "__pycache__").glob("*.pyc"),
    )
    found: list[Path] = []
    for place in places:
        if len(found) < COMPILED:
            fitting = _fitting(path for path in place if path.suffix in COMPILED_SUFFIXES)
            found += [path for path in fitting if path not in found]
    return found[:COMPILED]


def _fitting(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.is_file() and SMALLEST <= p.stat().st_size <= LARGEST)


def _spread(paths: list[Path], count: int) -> list[Path]:
    """Return ``count`` of the paths, evenly spread over the sorted list, or all of them."""
    if len(paths) <= count:
        return paths
    return [paths[index * len(paths) // count] for index in range(count)]


def _file(path: Path, library: Path) -> File:
    content = path.read_bytes()
    name = path.relative_to(library) if path.is_relative_to(library) else path.name
    return File(path, str(name), len(content), hashlib.sha256(content).hexdigest())
