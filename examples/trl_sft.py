"""TRL: supervised fine-tuning of a small GPT-2 on English prose; plugins come with a callback.

Run it:  python examples/trl_sft.py
Needs:   pip install "stablekit[transformers]" trl
"""

import math
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from stablekit_transformers import StableKitCallback

BAD = {20: math.nan, 45: 1e4}  # backward pass -> what multiplies the gradient of the embedding


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, so that nothing is downloaded."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=258, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1
)
model = GPT2LMHeadModel(config)
passes = iter(range(1_000_000))
model.transformer.wte.weight.register_hook(lambda grad: grad * BAD.get(next(passes), 1.0))

paragraphs = [text for topic in topics.values() for text in topic.split("\n\n") if len(text) > 64]
stable = StableKitCallback("nonfinite-guard", "zclip")
trainer = SFTTrainer(
    model,
    SFTConfig(
        "out",
        max_steps=60,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        max_length=64,
        bf16=False,
        logging_steps=10,
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"text": paragraphs[:300]}),
    processing_class=byte_tokenizer(),
    callbacks=[stable],  # the one new line
)
trainer.train()
print(stable.session.summary())
