"""Fine-tune with the Hugging Face Trainer, protected by one line; one gradient in twenty is NaN.

Run it:  python examples/hf_trainer.py          (20 seconds on two CPU cores)
Needs:   pip install "stablekit[transformers]"
"""

import itertools
import pydoc_data.topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stablekit_transformers import StableKitCallback

LENGTH, ROWS = 64, 1024

# Real text, byte by byte: Python's own documentation.
text = "".join(pydoc_data.topics.topics.values()).encode()[: LENGTH * ROWS]
rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(ROWS, LENGTH)
dataset = [{"input_ids": row, "labels": row} for row in rows]

config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)
model = LlamaForCausalLM(config)

# Every twentieth gradient of one matrix is NaN, as a corrupt batch or an overflow would make it.
batches = itertools.count(1)
model.lm_head.weight.register_hook(lambda grad: grad.log() if next(batches) % 20 == 0 else grad)

callback = StableKitCallback("nonfinite-guard", "zclip")
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out",
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=dataset[64:],
    eval_dataset=dataset[:64],
    callbacks=[callback],  # without this line the loss is NaN from step 20 on
)
trainer.train()

print(callback.session.summary())
print(f"loss {trainer.evaluate()['eval_loss']:.2f}, {callback.session.skipped} skips")
