"""Tiny models on real text, and a Trainer in which things go wrong at known steps."""

from __future__ import annotations

import pydoc_data.topics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LENGTH = 48
Rows = list[dict[str, Tensor]]


def text(rows: int, *, skip: int = 0) -> Rows:
    """Return rows of bytes of Python's own documentation."""
    data = "".join(pydoc_data.topics.topics.values()).encode()[skip * LENGTH :]
    ids = torch.frombuffer(bytearray(data[: rows * LENGTH]), dtype=torch.uint8).long()
    return [{"input_ids": row, "labels": row} for row in ids.reshape(rows, LENGTH)]


def gpt2(width: int = 32, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama(width: int = 48) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:  # noqa: ANN401 - any of Trainer's
    """Return quiet arguments: 4 steps on the CPU, everything logged, nothing saved."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return TrainingArguments(**settings)


class FaultyTrainer(Trainer):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """A Trainer whose loss is multiplied by something at some steps."""

    faults: Mapping[int, float] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        *args: Any,  # noqa: ANN401 - as Trainer's
        **kwargs: Any,  # noqa: ANN401 - as Trainer's
    ) -> Any:  # noqa: ANN401 - as Trainer's
        found = super().compute_loss(model, inputs, *args, **kwargs)
        factor = self.faults.get(self.state.global_step, 1.0)
        if isinstance(found, tuple):
            return (found[0] * factor, *found[1:])
        return found * factor


def trainer(
    folder: Path,
    *,
    callbacks: list[Any] | None = None,
    model: PreTrainedModel | None = None,
    rows: Rows | None = None,
    faults: Mapping[int, float] | None = None,
    optimizers: tuple[Any, Any] = (None, None),
    evaluate: Rows | None = None,
    **changes: Any,  # noqa: ANN401 - any of Trainer's arguments
) -> FaultyTrainer:
    """Return a Trainer for a tiny model."""
    made = FaultyTrainer(
        model=gpt2() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=text(64) if rows is None else rows,
        eval_dataset=evaluate,
        callbacks=callbacks,
        optimizers=optimizers,
    )
    made.faults = faults or {}
    return made


def break_gradient(
    model: nn.Module | None, name: str, at: int, value: float = float("nan")
) -> None:
    """Put a value into one element of the gradient of a parameter, the at-th time it is made."""
    assert model is not None
    calls = iter(range(10**9))

    def spoil(gradient: Tensor) -> Tensor:
        if next(calls) != at:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    dict(model.named_parameters())[name].register_hook(spoil)


def weights(model: nn.Module | None) -> Tensor:
    assert model is not None
    return torch.cat([param.detach().flatten() for param in model.parameters()]).clone()


def steps(made: Trainer) -> list[dict[str, float]]:
    """Return the log entries of training steps."""
    return [entry for entry in made.state.log_history if "loss" in entry]
