"""A language model, a tokenizer and a text small enough for a test of TRL, all made here."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

STEPS = 6


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes; nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>"
    )


def model(faults: Mapping[int, float]) -> GPT2LMHeadModel:
    """Return a GPT-2 whose embedding gradients are multiplied in the backward passes named.

    Args:
        faults: number of the backward pass, from 0 -> factor.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=1
    )
    made = GPT2LMHeadModel(config)
    seen = iter(range(1_000_000))

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * faults.get(next(seen), 1.0)

    made.transformer.wte.weight.register_hook(spoil)
    return made


def sentences(count: int) -> list[str]:
    """Return pieces of English prose from the documentation of Python."""
    prose = " ".join(topics["assignment"].split())
    return [prose[40 * i : 40 * (i + 1)] for i in range(count)]


def arguments(folder: object) -> dict[str, Any]:
    """Return what every trainer here is told."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
