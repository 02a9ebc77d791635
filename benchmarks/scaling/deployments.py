"""Models on machines, from one accelerator to ten thousand, that the model is evaluated for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from benchmarks.scaling.sizes import Held, Mesh, Shape, held
from benchmarks.workloads import GPT2
from benchmarks.workloads import shapes as gpt2_shapes


@final
@dataclass(frozen=True)
class Decoder:
    """A LLaMA-like decoder: grouped-query attention, gated MLP, untied embeddings.

    Args:
        layers: how many blocks.
        width: of the residual stream.
        hidden: of the MLP, or of an expert.
        keys: width of keys and of values.
        vocabulary: rows of both embeddings.
        queries: width of queries, if not ``width``.
        experts: MLPs a block, every weight of each a tensor of its own.
        head: width of a head whose queries and keys are normalised.
    """

    layers: int
    width: int
    hidden: int
    keys: int
    vocabulary: int
    queries: int | None = None
    experts: int = 1
    head: int | None = None

    def block(self) -> list[Shape]:
        """Return the shapes of one block."""
        width, queries = self.width, self.queries or self.width
        attention: list[Shape] = [
            (queries, width),
            (self.keys, width),
            (self.keys, width),
            (width, queries),
        ]
        mlp: list[Shape] = [(self.hidden, width), (self.hidden, width), (width, self.hidden)]
        router: list[Shape] = [(self.experts, width)] if self.experts > 1 else []
        norms: list[Shape] = [(self.head,)] * 2 if self.head else []
        return [*attention, *norms, *router, *mlp * self.experts, (width,), (width,)]

    def shapes(self, stages: int = 1) -> list[Shape]:
        """Return the shapes of the first stage, which holds an embedding and most blocks."""
        embedding = (self.vocabulary, self.width)
        blocks = self.block() * math.ceil(self.layers / stages)
        return [embedding, *blocks, *([(self.width,), embedding] if stages == 1 else [])]


@final
@dataclass(frozen=True)
class Deployment:
    """A training run.

    Args:
        name: the model, and on what.
        mesh: how it is spread.
        shapes: of the parameters of one stage.
        active: parameters that work on a token.
        tokens: in a step, over all ranks.
    """

    name: str
    mesh: Mesh
    shapes: tuple[Shape, ...]
    active: float
    tokens: float

    @property
    def held(self) -> Held:
        """What a rank holds, gradients in float32."""
        return held(self.shapes, self.mesh)


GPT = tuple(gpt2_shapes(GPT2))
LLAMA_7B = Decoder(32, 4096, 11008, 4096, 32000)
LLAMA_70B = Decoder(80, 8192, 28672, 1024, 128256)
LLAMA_405B = Decoder(126, 16384, 53248, 1024, 128256)
QWEN_235B = Decoder(94, 4096, 1536, 512, 151936, queries=8192, experts=128, head=128)

HSDP = Mesh(replicate=8, shard=64)
FLAT = Mesh(shard=1280, tensor=8)
FOUR_WAYS = Mesh(pipeline=16, replicate=2, shard=40, tensor=8)

DEPLOYMENTS = (
    Deployment("124M, short steps", Mesh(), GPT, 124e6, 2**14),
    Deployment("124M", Mesh(), GPT, 124e6, 2**19),
    Deployment("124M, DDP", Mesh(replicate=8), GPT, 124e6, 2**19),
    Deployment("7B, FSDP2", Mesh(shard=8), tuple(LLAMA_7B.shapes()), 6.7e9, 2**19),
    Deployment("70B, HSDP", HSDP, tuple(LLAMA_70B.shapes()), 70e9, 2**22),
    Deployment("235B MoE, HSDP", HSDP, tuple(QWEN_235B.shapes()), 22e9, 2**22),
    Deployment("405B, FSDP2 x TP", FLAT, tuple(LLAMA_405B.shapes()), 405e9, 2**24),
    Deployment("405B, 4-D", FOUR_WAYS, tuple(LLAMA_405B.shapes(16)), 405e9, 2**24),
)
