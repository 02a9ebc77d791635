"""``python -m benchmarks.recovery``: does going back help? A small run with things that go wrong.

A character GRU on Python's own help texts, AdamW with gradients clipped to 1, and one fault in the
middle of the run. Printed is the held-out loss at the end, the mean over seeds and its standard
deviation, for each fault and each chain of plugins; also what the chains cost where nothing is
wrong. A run that died counts as the loss it died with.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import stablekit
from stablekit.errors import DivergenceError, NonFiniteError
from stablekit_recovery import Escalation, LRBackoff, Rollback, SkipSpikes

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT, BATCH, STEPS = 64, 16, 500
START, LONG = 300, 30
RATE = 3e-3
DEAD = math.log(256)
"""The loss of a guess: what a model that is not finite counts as."""

FAULTS = (
    "nothing",
    "noise for 30 steps",
    "rate x100 for 30 steps",
    "one NaN in a weight",
    "NaN loss for 30 steps",
)


class Data(NamedTuple):
    """Bytes to train on, and windows that are held out."""

    train: Tensor
    held_out: Tensor


class Outcome(NamedTuple):
    """How a run ended."""

    loss: float
    skipped: int
    rollbacks: int
    stopped: bool


class Model(nn.Module):
    """Embedding, GRU, linear head."""

    def __init__(self) -> None:
        """Build."""
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.rnn = nn.GRU(32, 96, batch_first=True)
        self.head = nn.Linear(96, 256)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the loss of predicting each next byte."""
        hidden, _ = self.rnn(self.embedding(rows[:, :-1]))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


def chains() -> dict[str, Callable[[], list[Any]]]:
    """Return the chains; each clips to 1 as the first one does."""
    guard = ["nonfinite-guard:max_consecutive=1000"]

    def rollback() -> Rollback:
        return Rollback(25, patience=10, window=64)

    return {
        "clip": lambda: ["global-norm"],
        "guard + clip": lambda: [*guard, "global-norm"],
        "+ skip-spikes": lambda: [*guard, SkipSpikes(window=64), "global-norm"],
        "+ lr-backoff": lambda: [*guard, SkipSpikes(window=64), LRBackoff(), "global-norm"],
        "+ rollback": lambda: [*guard, "global-norm", rollback()],
        "escalation + clip": lambda: [
            Escalation(skip=SkipSpikes(window=64), rollback=rollback()),
            "global-norm",
        ],
    }


def data() -> Data:
    """Return the help texts of Python; the last tenth is held out."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[key] for key in sorted(topics)).encode("ascii", errors="replace")
    content = torch.tensor(list(text))
    cut = len(text) * 9 // 10
    order = torch.Generator().manual_seed(0)
    return Data(content[:cut], windows(content[cut:], 256, order))


def windows(content: Tensor, count: int, order: torch.Generator) -> Tensor:
    """Return consecutive bytes from random places, ``[count, CONTEXT + 1]``."""
    starts = torch.randint(len(content) - CONTEXT, (count, 1), generator=order)
    return content[starts + torch.arange(CONTEXT + 1)]


def run(chain: list[Any], fault: str, seed: int, source: Data) -> Outcome:
    """Train once."""
    torch.manual_seed(seed)
    model, order = Model(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    session = stablekit.attach(optimizer, *chain, model=model)
    stopped = False
    for step in range(STEPS):
        rows = windows(source.train, BATCH, order)
        is_bad = START <= step < START + LONG
        if is_bad and fault.startswith("noise"):
            rows = torch.randint(256, rows.shape, generator=order)
        if step == START and fault.startswith("one NaN"):
            model.head.weight.data[0, 0] = math.nan
        rate = RATE * (100 if is_bad and fault.startswith("rate") else 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model(rows) * (math.nan if is_bad and fault.startswith("NaN") else 1.0)
        loss.backward()
        session.observe(loss=loss, batch=step)
        try:
            optimizer.step()
        except (DivergenceError, NonFiniteError):
            stopped = True
            break
    with torch.no_grad():
        end = model(source.held_out).item()
    went_back = sum(event.kind == "rollback" for event in session.events)
    return Outcome(end if math.isfinite(end) else DEAD, session.skipped, went_back, stopped)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--faults", default="", help="only those that have this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = data()
    for fault in (fault for fault in FAULTS if options.faults in fault):
        print(f"\n{fault}")
        for name, make in chains().items():
            runs = [run(make(), fault, seed, source) for seed in range(options.seeds)]
            losses = [one.loss for one in runs]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            skips = statistics.fmean(one.skipped for one in runs)
            returns = statistics.fmean(one.rollbacks for one in runs)
            ended = f", {sum(one.stopped for one in runs)} stopped" * any(r.stopped for r in runs)
            print(
                f"  {name:18} {statistics.fmean(losses):.3f} +- {spread:.3f}"
                f"   {skips:4.1f} skipped, {returns:3.1f} rollbacks{ended}",
                flush=True,
            )


if __name__ == "__main__":
    main()
