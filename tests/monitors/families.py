"""Tiny models of transformers, on which monitors are tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="tiny models of transformers")

WORDS, HEADS, KEY_HEADS, LENGTH = 64, 4, 2, 10

FAMILIES = (
    "Llama",
    "GPT2",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Mistral",
    "Mixtral",
    "Olmo2",
    "Qwen2Moe",
    "Qwen3Moe",
    "SmolLM3",
)
"""Those whose attention AttentionMonitor finds."""


def tiny(family: str, **changes: Any) -> Any:  # noqa: ANN401 - a model of transformers
    """Return a two-layer language model with weights large enough to see."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": WORDS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    if family == "GPT2":
        settings |= {"n_embd": 32, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        settings |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
        settings |= {"max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8}
    if family == "Olmo2":
        del settings["head_dim"]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0)
    return model.train()


def batch(number: int = 0, *, padded: bool = False) -> dict[str, Tensor]:
    """Return two sentences; padded, the first is shorter."""
    made = torch.Generator().manual_seed(number)
    ids = torch.randint(1, WORDS, (2, LENGTH), generator=made)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def attention_of(model: nn.Module) -> list[Any]:
    """Return the attention modules, in order."""
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]
