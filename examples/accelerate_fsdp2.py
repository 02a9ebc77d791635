"""A model sharded over two processes: a NaN on one is skipped on both, resuming is bit-identical.

Run it:  torchrun --nproc_per_node 2 examples/accelerate_fsdp2.py     (CPU only, 15 seconds)
Needs:   pip install "stablekit[accelerate]"
On GPUs Accelerate shards by itself (fsdp_plugin=...), and its save_state has the session in it.
"""

from pydoc_data.topics import topics

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import Embedding, Flatten, Linear, Sequential

import stablekit_accelerate
from stablekit.checkpoint import SessionState

SHOWN = "loss", "grad_norm", "zclip/threshold"
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
text = torch.tensor(list("".join(topics.values()).encode())).unfold(0, 9, 9)


def train(*, resume: bool) -> torch.Tensor:
    """Train a model that predicts a byte from the eight before it; return its weights."""
    torch.manual_seed(0)
    model = fully_shard(Sequential(Embedding(256, 32), Flatten(), Linear(256, 256)))
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=3e-3))
    chain = "nonfinite-guard", "zclip:max_grad_norm=2"
    with stablekit_accelerate.attach(accelerator, optimizer, *chain, model=model) as session:
        if resume:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "stablekit": SessionState(session)}
            dcp.load(state, checkpoint_id="out")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        for micro in range(2 * session.number, 200):
            if micro == 100 and not resume:
                weights, moments = get_state_dict(model, optimizer)
                state = {"model": weights, "optimizer": moments, "stablekit": SessionState(session)}
                dcp.save(state, checkpoint_id="out")
            rows = text[32 * (2 * micro + accelerator.process_index) :][:32]
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(rows[:, :8]), rows[:, 8])
                bad = micro == 141 and accelerator.process_index == 1
                accelerator.backward(loss * torch.nan if bad else loss)
                optimizer.step()
                optimizer.zero_grad()
            if micro % 20 == 19:
                row = (round(session.metrics()[name], 3) for name in SHOWN)
                accelerator.print(session.number, *row, session.skipped, sep="\t")
        accelerator.print(session.summary())
    return torch.cat([param.full_tensor().flatten() for param in model.parameters()])


accelerator.print("step", *SHOWN, "skipped", sep="\t")
straight, resumed = train(resume=False), train(resume=True)
accelerator.print("bit-identical after resuming:", torch.equal(straight, resumed))
accelerator.end_training()
