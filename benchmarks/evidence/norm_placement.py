"""``python -m benchmarks.evidence.norm_placement``: where norms stand in a small LLaMA, on bytes.

A LLaMA of four layers on Python's own help texts, AdamW with a warm-up and gradients clipped to 1
in every arm, at a low and at a high learning rate. Printed for each arm and rate are the held-out
loss at the end (mean and standard deviation over seeds), how many runs diverged, and the largest
gradient norm before clipping. A run has diverged when a loss was not finite or when it ends above
the loss of predicting every byte by its frequency.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pydoc_data.topics
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import stablekit_layers
from stablekit_layers import HybridNorm, HybridNormStar, NormFormer, PeriNorm, QKNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

CONTEXT, BATCH, STEPS, SEEDS = 64, 16, 200, 3
RATES = (3e-3, 3e-2)
INIT = 0.079
"""Deviation of weights at first: ``sqrt(2 / (5 * hidden_size))``, as in the paper of HybridNorm."""
SHAPE: Any = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}

ARMS: dict[str, Callable[[], list[stablekit_layers.Surgery]]] = {
    "pre-norm": list,
    "qk-norm": lambda: [QKNorm()],
    "peri-ln": lambda: [PeriNorm()],
    "normformer": lambda: [NormFormer()],
    "hybridnorm": lambda: [HybridNorm()],
    "hybridnorm-star": lambda: [HybridNormStar()],
}


class Data(NamedTuple):
    """Bytes to train on, windows that are held out, and the loss of their frequencies."""

    train: Tensor
    held_out: Tensor
    unigram: float


class Outcome(NamedTuple):
    """How a run ended."""

    loss: float
    diverged: bool
    largest_norm: float


def texts() -> Data:
    """Return the help texts of Python, which are on every machine."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, held_out = data[:400_000], data[400_000:].unfold(0, CONTEXT, CONTEXT)[:256]
    share = (torch.bincount(train, minlength=256) + 1.0) / (len(train) + 256)
    return Data(train, held_out, -share.log()[held_out[:, 1:]].mean().item())


def model_of(arm: str, seed: int, init: float = INIT) -> LlamaForCausalLM:
    """Return a new model; its linear layers are the same in every arm."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "intermediate_size": 192, **SHAPE}
    config = LlamaConfig(max_position_embeddings=CONTEXT, initializer_range=init, **sizes)
    model = LlamaForCausalLM(config)
    stablekit_layers.apply(model, *ARMS[arm]())
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and nothing else."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def run(model: LlamaForCausalLM, rate: float, seed: int, steps: int, data: Data) -> Outcome:
    """Train one model and evaluate it."""
    optimizer = optimizer_of(model, rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=max(1, steps // 15))
    batches, norms = torch.Generator().manual_seed(seed), list[float]()
    for _ in range(steps):
        starts = torch.randint(len(data.train) - CONTEXT, (BATCH,), generator=batches)
        rows = torch.stack([data.train[at : at + CONTEXT] for at in starts])
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        if not loss.isfinite():
            return Outcome(math.nan, True, max(norms, default=math.nan))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        warm_up.step()
    end = evaluate(model, data.held_out)
    return Outcome(end, not end < data.unigram, max(norms))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Return the held-out loss."""
    model.train(False)
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss.item()


def line(rate: float, arm: str, ends: Sequence[Outcome]) -> str:
    """Return one row of the table; a loss that is not finite is left out of the mean."""
    losses = [end.loss for end in ends if math.isfinite(end.loss)]
    spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
    mean = statistics.mean(losses) if losses else math.nan
    lost = sum(end.diverged for end in ends)
    largest = max(end.largest_norm for end in ends)
    return (
        f"| {rate:g} | {arm} | {mean:.3f} +- {spread:.3f} | {lost} of {len(ends)} | {largest:.2g} |"
    )


def table(given: argparse.Namespace) -> Iterable[str]:
    """Yield the lines of the table as they come."""
    data = texts()
    yield (
        f"{given.steps} steps, {given.seeds} seeds, weights of deviation {given.init:g} at first;"
        f" predicting bytes by frequency gives {data.unigram:.3f}\n"
    )
    yield "| rate | arm | held-out loss | diverged | largest gradient norm |"
    yield "|---|---|---|---|---|"
    for rate, arm in itertools.product(given.rates, given.arms):
        ends = [
            run(model_of(arm, seed, given.init), rate, seed, given.steps, data)
            for seed in range(given.seeds)
        ]
        yield line(rate, arm, ends)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.norm_placement")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--init", type=float, default=INIT)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    torch.set_num_threads(1)
    for text in table(parser.parse_args(arguments)):
        print(text, flush=True)


if __name__ == "__main__":
    main()
