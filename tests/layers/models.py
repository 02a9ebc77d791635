"""Tiny models of three families, their data, and steps of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

transformers: Any = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 61, 12


def llama(**changes: Any) -> Any:  # noqa: ANN401 - a model of transformers
    return _split(transformers.LlamaConfig, transformers.LlamaForCausalLM, changes)


def qwen3(**changes: Any) -> Any:  # noqa: ANN401
    changes = {"head_dim": 8, **changes}
    return _split(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, changes)


def mistral(**changes: Any) -> Any:  # noqa: ANN401
    changes = {"sliding_window": 4, **changes}
    return _split(transformers.MistralConfig, transformers.MistralForCausalLM, changes)


def qwen2(**changes: Any) -> Any:  # noqa: ANN401
    return _split(transformers.Qwen2Config, transformers.Qwen2ForCausalLM, changes)


def gpt2(**changes: Any) -> Any:  # noqa: ANN401
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_COMMON, **_DRY}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **changes}))


FAMILIES = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3}

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _split(config: Any, model: Any, changes: dict[str, Any]) -> Any:  # noqa: ANN401
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        **_COMMON,
    }
    torch.manual_seed(0)
    return model(config(**{**settings, **changes}))


def tokens(seed: int = 1, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens() if ids is None else ids).logits
    return found


def shake(model: nn.Module, seed: int = 5) -> None:
    """Move all gains and biases away from 1 and 0, so that what they do shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(0.2 * torch.randn(param.shape, generator=generator))


def train(model: nn.Module, steps: int = 3, forward: Any = None) -> list[Tensor]:  # noqa: ANN401
    """Return the losses of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for step in range(steps):
        ids = tokens(seed=step)
        scores = (model if forward is None else forward)(input_ids=ids).logits
        loss = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def with_adapters(model: nn.Module, target: str) -> Any:  # noqa: ANN401 - a model of PEFT
    """Return a model with adapters that change what it computes."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    )
