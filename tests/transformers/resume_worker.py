"""Train straight, or until killed, or from a checkpoint: each in a process of its own.

``python resume_worker.py folder`` forks one process a run, so that the imports are paid once; what
each run ended with is in ``folder/<case>/<run>.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from tests.transformers.equip import equipped
from tests.transformers.tiny import gpt2, steps, text

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, SAVED, KILLED = 40, 17, 20
FAULTS = {8: float("nan"), 25: float("nan"), 30: 1e3}
CHAINS: dict[str, tuple[str, ...]] = {
    "guard-zclip": ("nonfinite-guard", "zclip:warmup_steps=5"),
    "guard-adagc": ("nonfinite-guard", "adagc:warmup_steps=5"),
    "guard-autoclip": ("nonfinite-guard", "autoclip:percentile=50"),
    "all": ("nonfinite-guard", "zclip:warmup_steps=5", "adagc:warmup_steps=30", "autoclip"),
}
CASES = [*(("callback", chain) for chain in CHAINS), ("attach", "guard-zclip"), ("attach", "all")]


class Fate(TrainerCallback):
    """Save once; perhaps end the process as the machine would, some steps later."""

    def __init__(self, run: str) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        control.should_save = state.global_step == SAVED
        if self.run == "killed" and state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: str, mode: str, chain: str, folder: Path) -> None:
    """Train in one of the three ways and write down where it ended."""
    output = folder / ("straight-out" if run == "straight" else "out")
    made, callback = equipped(
        mode,
        output,
        *CHAINS[chain],
        model=gpt2(16, dropout=0.1),
        rows=text(90),
        faults=FAULTS,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    made.add_callback(Fate(run))
    assert made.model is not None
    made.train(resume_from_checkpoint=True if run == "resumed" else None)
    assert made.optimizer is not None
    found = {
        "model": made.model.state_dict(),
        "optimizer": made.optimizer.state_dict(),
        "session": callback.session.state_dict(),
        "log": [{k: v for k, v in e.items() if k != "epoch"} for e in steps(made)],
        "first": callback.session.number - (STEPS - (SAVED if run == "resumed" else 0)),
    }
    torch.save(found, folder / f"{run}.pt")


def start(work: Callable[[], None]) -> int:
    """Run a function in a forked process; return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def signal_of(child: int) -> int:
    """Wait for a process; return the signal that ended it, 0 for none."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a training run failed; its traceback is above")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(root: Path) -> None:
    """Make all runs of all cases, the straight one beside the others."""
    torch.set_num_threads(1)
    for mode, chain in CASES:
        folder = root / f"{mode}-{chain}"
        folder.mkdir()
        straight = start(partial(train, "straight", mode, chain, folder))
        ended = signal_of(start(partial(train, "killed", mode, chain, folder)))
        (folder / "killed.signal").write_text(str(ended))
        signal_of(start(partial(train, "resumed", mode, chain, folder)))
        signal_of(straight)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
