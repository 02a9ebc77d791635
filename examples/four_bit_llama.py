"""Train a LLaMA in fake 4 bits with Adam, and with Adam and Stable-SPAM; print what came out.

Run it:  python examples/four_bit_llama.py [steps] [seeds]    (12 runs, 4 minutes on two CPU cores)
Needs:   pip install "stablekit[transformers]"
"""

import pydoc_data.topics
import statistics
import sys

import torch
from torch.nn.utils.parametrize import register_parametrization
from transformers import LlamaConfig, LlamaForCausalLM

import stablekit

STEPS, SEEDS = (*map(int, sys.argv[1:]), *(250, 3)[len(sys.argv) - 1 :])
ARMS = {"Adam": [], "Adam + stable-spam": [f"stable-spam:total_steps={STEPS}"]}
SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}

text = "".join(pydoc_data.topics.topics.values()).encode()
data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
train, held_out = data[:400_000], data[400_000:].unfold(0, 64, 64)[:256]


class FourBits(torch.nn.Module):
    """Round every row to 15 levels; gradients pass as if nothing had happened."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantise."""
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
        return x + (torch.round(x / scale) * scale - x).detach()


def run(arm: str, lr: float, seed: int) -> float:
    """Train a new model, whose linear layers compute in 4 bits, and return its held-out loss."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=192, **SHAPE))
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            register_parametrization(layer, "weight", FourBits())
            layer.register_forward_pre_hook(lambda _, given: (FourBits()(given[0]), *given[1:]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    stablekit.attach(optimizer, *ARMS[arm], model=model)
    for _ in range(STEPS):
        rows = torch.stack([train[at : at + 64] for at in torch.randint(len(train) - 64, (16,))])
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.item()


print(f"held-out loss after {STEPS} steps, mean and deviation of {SEEDS} seeds")
for lr in (1e-3, 3e-3):
    for arm in ARMS:
        ends = [run(arm, lr, seed) for seed in range(SEEDS)]
        print(f"lr {lr:g}  {arm:20}  {statistics.mean(ends):.3f} +- {statistics.pstdev(ends):.3f}")
