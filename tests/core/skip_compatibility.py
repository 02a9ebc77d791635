"""Ask every optimizer of pytorch_optimizer whether a skipped step leaves it bit-identical.

``python -m tests.core.skip_compatibility`` writes the table of ``docs/skip-compatibility.md``.
"""

from __future__ import annotations

import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch

import stablekit
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import backward, copies, difference, equal, picture, small_model

PAGE = Path(__file__).parents[2] / "docs" / "skip-compatibility.md"
# RAdam and AdaShift take their first step after 5 and 10 gradients.
STEPS = 12

HEAD = """\
# Optimizers that a skipped step leaves bit-identical

Written by `python -m tests.core.skip_compatibility`, checked by
`tests/core/test_skip_compatibility.py`.

A step skipped by stablekit (here: one NaN in one gradient, and `nonfinite-guard`) must change no
bit of the parameters, of `optimizer.state`, of `param_groups`, of any other attribute of the
optimizer (inner optimizers included) or of torch's random numbers, and must give every gradient
back. Asked at the first step ever and after {steps} steps; one more step must work afterwards.

All optimizers of `torch.optim` pass, LBFGS and SparseAdam included
(`tests/core/test_torch_optimizers.py`).

Of the {all} optimizers of pytorch_optimizer {version}, {trains} train with default arguments, and
**{passes} of these {trains}** pass. "Train with default arguments" means: made with
`cls(model.parameters())` (plus `lr=0.01` if a learning rate is required) for a model of two linear
layers, {steps} plain steps raise nothing and move the parameters to finite values.
"""


def make(cls: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with default arguments."""
    try:
        optimizer: torch.optim.Optimizer = cls(model.parameters())
    except TypeError as error:
        if "'lr'" not in str(error):
            raise
        optimizer = cls(model.parameters(), lr=0.01)
    return optimizer


def why_not_trained(cls: Any) -> str:
    """Return why an optimizer does not train with default arguments, empty if it does."""
    model = small_model()
    before = copies(model.parameters())
    try:
        optimizer = make(cls, model)
        for step in range(STEPS):
            backward(model, step % 2)
            optimizer.step()
    except Exception as error:  # noqa: BLE001 - anything a foreign optimizer raises is an answer
        return f"{type(error).__name__}: {error}"
    if equal(before, copies(model.parameters())):
        return f"no parameter moves in {STEPS} steps"
    finite = all(bool(param.isfinite().all()) for param in model.parameters())
    return "" if finite else f"parameters are not finite after {STEPS} steps"


def why_not_skipped(cls: Any) -> str:
    """Return what a skipped step changes or raises, empty if it changes nothing."""
    model = small_model()
    optimizer = make(cls, model)
    session = stablekit.attach(optimizer, NonFiniteGuard())
    try:
        for step in range(STEPS + 2):
            backward(model, step % 2)
            if step not in (0, STEPS):
                optimizer.step()
            elif found := _skip(optimizer, model):
                return f"step {step + 1}: {found}"
    except Exception as error:  # noqa: BLE001 - anything a foreign optimizer raises is an answer
        return f"{type(error).__name__}: {error}"
    return "" if session.skipped == 2 else f"skipped {session.skipped} steps of 2"


def _skip(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> str:
    grads = [param.grad for param in model.parameters()]
    assert grads[0] is not None
    grads[0].view(-1)[0] = math.nan
    shown = [picture(optimizer), copies(grad for grad in grads if grad is not None)]
    optimizer.step()
    if any(param.grad is not g for param, g in zip(model.parameters(), grads, strict=True)):
        return "gradients were not given back"
    return difference(shown, [picture(optimizer), copies(g for g in grads if g is not None)])


def survey() -> tuple[dict[str, str], dict[str, str]]:
    """Return name -> reason for optimizers that do not train, and for those that do (mostly "")."""
    idle, trained = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of foreign optimizers
        for name in sorted(pytorch_optimizer.get_supported_optimizers()):
            cls = pytorch_optimizer.load_optimizer(name)
            reason = why_not_trained(cls)
            if reason:
                idle[name] = reason
            else:
                trained[name] = why_not_skipped(cls)
    return idle, trained


def page(idle: dict[str, str], trained: dict[str, str]) -> str:
    """Return the text of the page."""
    passes = [name for name, reason in trained.items() if not reason]
    head = HEAD.format(
        steps=STEPS,
        all=len(idle) + len(trained),
        version=version("pytorch_optimizer"),
        trains=len(trained),
        passes=len(passes),
    )
    fails = {name: reason for name, reason in trained.items() if reason}
    return "\n".join(
        [
            head,
            *_table("Pass", dict.fromkeys(passes, "bit-identical")),
            *_table("Do not pass", fails),
            *_table("Do not train with default arguments", idle),
        ]
    )


def _table(title: str, rows: dict[str, str]) -> list[str]:
    if not rows:
        return [f"## {title}: none", ""]
    lines = [f"| {name} | {_one_line(reason)} |" for name, reason in rows.items()]
    return [f"## {title}: {len(rows)}", "", "| optimizer | |", "| --- | --- |", *lines, ""]


def _one_line(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 160 else f"{line[:157]}..."


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(*survey()))
