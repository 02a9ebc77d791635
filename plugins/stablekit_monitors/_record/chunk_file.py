"""The file of a chunk: an ``.npz`` that numpy reads without pickle, replaced in one piece.

==========  ================  =================================================================
``steps``   int64 [T]         number of the step of each row
``stride``  int64 [T]         how many steps a row stands for
``ok``      bool [T]          false where the step was skipped
``keys``    str [M]           names of the metrics
``scalars`` float64 [T, M]    metrics, NaN where not recorded
``norms``   float32 [T, P]    norm of each gradient before anything changed it
``absent``  uint8 [T, P / 8]  packed bits, set where there was no gradient; left out if none is
``columns`` int64 [P]         positions of the tensors in ``names`` of run.json
``level``   int64             how often the rows were thinned
==========  ================  =================================================================

Nothing is synced to the disk: what was written outlives a killed process, and a machine that loses
power may lose the last files. Those are then damaged or missing, which a reader is told.
"""

from __future__ import annotations

import io
import os
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from stablekit_monitors._record.chunk import Chunk

if TYPE_CHECKING:
    from pathlib import Path


def chunk_paths(folder: Path) -> list[Path]:
    """Return the chunk files of a run in recorded order."""
    return sorted(folder.glob("chunk-*.npz"))


def chunk_path(folder: Path, number: int) -> Path:
    """Return the path of the chunk of this number."""
    return folder / f"chunk-{number:08d}.npz"


def chunk_number(path: Path) -> int:
    """Return the number of a chunk file."""
    return int(path.stem.removeprefix("chunk-"))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it is there as it was before, or as it is after."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(data)
    os.replace(draft, path)


def write_chunk(path: Path, chunk: Chunk) -> int:
    """Write or replace a chunk file and return its size."""
    arrays: dict[str, Any] = {
        "steps": chunk.steps,
        "stride": chunk.stride,
        "ok": chunk.ok,
        "keys": np.array(chunk.keys, np.str_),
        "scalars": chunk.scalars,
        "norms": chunk.norms,
        "columns": chunk.columns,
        "level": np.int64(chunk.level),
    }
    if not chunk.present.all():
        arrays["absent"] = np.packbits(~chunk.present, axis=1)
    file = io.BytesIO()
    np.savez(file, **arrays)
    replace_file(path, file.getvalue())
    return file.tell()


def read_chunk(path: Path) -> Chunk:
    """Read a chunk file.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is damaged.
    """
    data = io.BytesIO(path.read_bytes())
    try:
        with np.load(data, allow_pickle=False) as file:
            return _chunk(dict(file))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_level(path: Path) -> int:
    """Read how often the rows of a file were thinned, and nothing else of it.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return int(file["level"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _chunk(arrays: dict[str, Any]) -> Chunk:
    norms = arrays["norms"]
    if "absent" in arrays:
        absent = np.unpackbits(arrays["absent"], axis=1, count=norms.shape[1]).astype(np.bool_)
    else:
        absent = np.zeros(norms.shape, np.bool_)
    return Chunk(
        arrays["steps"],
        arrays["stride"],
        arrays["ok"],
        tuple(arrays["keys"].tolist()),
        arrays["scalars"],
        norms,
        ~absent,
        arrays["columns"],
        int(arrays["level"]),
    )
