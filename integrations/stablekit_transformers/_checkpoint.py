"""Finding the plugins' state of a checkpoint that Trainer has already loaded.

Trainer gives callbacks no path. So a mark travels in ``trainer_state.json``: which run wrote the
checkpoint, and where to. A folder is taken only if it carries the same mark.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from stablekit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import TrainerState, TrainingArguments

    from stablekit import Session

KEY = "stablekit"
_SURGERIES = "stablekit_surgery"  # the field of a model's configuration that names them
_BESIDE = "stablekit.pt"
_NO_STATE = object()


def mark(state: TrainerState, args: TrainingArguments) -> None:
    """Let the checkpoints of this training say whose they are."""
    place = {"run": uuid.uuid4().hex, "output_dir": str(_output_dir(args))}
    _marks(state)[KEY] = {"args": {}, "attributes": place}


def refuse_other_model(model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Refuse to resume from what was saved with other surgeries than the model has.

    Raises:
        StateError: Trainer has loaded the weights that fit, which is not the model that was saved.
    """
    ours = _marks(state).get(KEY)
    output_dir = ours["attributes"]["output_dir"] if ours else _output_dir(args)
    for folder in dict.fromkeys(_candidates(args, state, str(output_dir))):
        if _mark_of(folder, state.global_step) == ours:
            refuse_surgeries(model, folder)


def refuse_surgeries(model: nn.Module, folder: str | Path) -> None:
    """Refuse a checkpoint of a model that had other surgeries.

    Raises:
        StateError: So it is.
    """
    file, config = Path(folder, "config.json"), getattr(model, "config", None)
    if config is None or not file.is_file():
        return
    saved = json.loads(file.read_text(encoding="utf-8")).get(_SURGERIES) or []
    made = json.loads(json.dumps(getattr(config, _SURGERIES, None) or []))
    if saved != made:
        raise StateError(
            f"{folder} was saved from a model with the surgeries {_names(saved)}, this model has"
            f" {_names(made)}: its weights do not fit. Make the same surgeries"
            " (stablekit_layers.apply) before Trainer gets the model"
        )


def find(args: TrainingArguments, state: TrainerState) -> tuple[dict[str, Any] | None, str]:
    """Return the session state of the checkpoint that was loaded, or None and the reason."""
    ours = _marks(state).get(KEY)
    if ours is None:
        return None, "the checkpoint was written without stablekit_transformers"
    looked = list(dict.fromkeys(_candidates(args, state, ours["attributes"]["output_dir"])))
    for folder in looked:
        if _mark_of(folder, state.global_step) == ours and (saved := _read(folder)) is not None:
            return saved, ""
    return None, (
        f"their state is in none of {', '.join(map(str, looked))}. Set"
        " TrainingArguments(resume_from_checkpoint=...) to the checkpoint's folder, or use"
        " stablekit_transformers.attach(trainer, ...)"
    )


def write_beside(session: Session, args: TrainingArguments, state: TrainerState) -> None:
    """Write the state into a checkpoint without ``optimizer.pt`` (FSDP has other files)."""
    folder = _output_dir(args) / f"checkpoint-{state.global_step}"
    if folder.is_dir() and not (folder / "optimizer.pt").is_file():
        part = folder / f"{_BESIDE}.part"
        torch.save(session.state_dict(), part)
        os.replace(part, folder / _BESIDE)


def read_beside(folder: str | Path) -> dict[str, Any] | None:
    """Return the state that :func:`write_beside` has left in a checkpoint, if it has."""
    beside = Path(folder, _BESIDE)
    if not beside.is_file():
        return None
    return dict(torch.load(beside, weights_only=True, map_location="cpu"))


def _names(surgeries: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['name']} {one['arguments']}" for one in surgeries) or "none"


def _candidates(args: TrainingArguments, state: TrainerState, output_dir: str) -> Iterator[Path]:
    name = f"checkpoint-{state.global_step}"
    if args.resume_from_checkpoint:
        yield Path(args.resume_from_checkpoint)
    yield _output_dir(args) / name
    yield Path(output_dir, name)


def _output_dir(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "").absolute()


def _marks(state: TrainerState) -> dict[str, Any]:
    """Return what callbacks keep in a TrainerState: a dictionary, whatever its annotation says."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _mark_of(folder: Path, step: int) -> Any:  # noqa: ANN401 - parsed JSON
    file = folder / "trainer_state.json"
    if not file.is_file():
        return _NO_STATE
    state = json.loads(file.read_text(encoding="utf-8"))
    marks = state.get("stateful_callbacks") or {}
    return marks.get(KEY) if state.get("global_step") == step else _NO_STATE


def _read(folder: Path) -> dict[str, Any] | None:
    optimizer = folder / "optimizer.pt"
    beside = read_beside(folder)
    if beside is not None or not optimizer.is_file():
        return beside
    # Mapped, so that only this key is read; copied, since the file may be written again.
    saved = torch.load(optimizer, weights_only=True, map_location="cpu", mmap=True)
    return dict(copy.deepcopy(saved[KEY])) if KEY in saved else None
