"""Which steps are counted: in how many processes, on which tensors, with what attached."""

from __future__ import annotations

from benchmarks.scaling.cases import TORCH, Case
from benchmarks.scaling.deployments import FLAT, FOUR_WAYS, HSDP, LLAMA_70B, LLAMA_405B
from benchmarks.scaling.members import MEMBERS
from benchmarks.scaling.sizes import Mesh, Shape

PROCESSES = 4
SIMULATING = (2, 3)
"""Ranks that count simulated cases while the others are in smaller worlds."""

LARGE: tuple[Shape, ...] = (*[(128, 512)] * 6, *[(512,)] * 3)
"""Mostly elements."""
SMALL: tuple[Shape, ...] = (*[(16, 64)] * 8, *[(32,)] * 8)
"""Mostly tensors."""
TALL: tuple[Shape, ...] = (*[(2048, 8)] * 3, (64,))
"""Mostly output units."""

GUARDED = ("nonfinite-guard", "zclip")
THREE = (*GUARDED, "adagc")
FOUR = (*THREE, "spike-monitor")
SINGLE = [(name,) for name in MEMBERS]
COMBINED = [
    GUARDED,
    FOUR,
    (*THREE, "agc"),
    ("adagc", "zclip"),
    ("zclip", "clip-value"),
    ("agc", "clip-value", "zclip"),
    ("quantile-clip", "quantile-clip(per_tensor)", "autoclip"),
    ("reads step.loss", "reads metrics"),
]
FEW = [(*FOUR, "agc"), ("agc", "clip-value", "zclip"), ("reads step.loss", "reads metrics")]

GLOO = {
    1: [
        *(Case(LARGE, Mesh(), chain) for chain in [*COMBINED, (TORCH,)]),
        *(Case(LARGE, Mesh(), chain, device_mode=False) for chain in [*SINGLE, THREE]),
        *(Case(LARGE, Mesh(), chain, fused=False) for chain in [GUARDED, *FEW]),
    ],
    2: [
        *(Case(LARGE, Mesh(shard=2), chain) for chain in [*COMBINED, (TORCH,)]),
        *(Case(LARGE, Mesh(replicate=2), chain) for chain in [*FEW, (TORCH,)]),
        *(Case(LARGE, Mesh(tensor=2), chain) for chain in [*FEW, (TORCH,)]),
    ],
    4: [
        *(Case(LARGE, Mesh(shard=4), chain) for chain in [*FEW, (TORCH,)]),
        *(Case(LARGE, Mesh(replicate=2, shard=2), chain) for chain in [*FEW, (TORCH,)]),
        *(Case(LARGE, Mesh(shard=2, tensor=2), chain) for chain in [*FEW, (TORCH,)]),
        *(
            Case(LARGE, Mesh(pipeline=2, shard=2), chain)
            for chain in [("adagc", "zclip"), *FEW, (TORCH,)]
        ),
    ],
}
"""World size -> what gloo processes count on the CPU."""

SIMULATED = [
    *(Case(SMALL, Mesh(), chain, simulated=True) for chain in [*SINGLE, *COMBINED]),
    *(Case(TALL, Mesh(), chain, simulated=True) for chain in FEW),
    *(Case(SMALL, HSDP, chain, simulated=True) for chain in [GUARDED, *FEW]),
    *(Case(TALL, Mesh(shard=4, tensor=2), chain, simulated=True) for chain in FEW),
    Case(tuple(LLAMA_405B.shapes(16)), FOUR_WAYS, FOUR, simulated=True),
    Case(tuple(LLAMA_70B.shapes()), HSDP, GUARDED, simulated=True),
    Case(tuple(LLAMA_405B.shapes()), FLAT, GUARDED, simulated=True),
]
"""What is counted on the meta device; ranks that are no processes answer nothing."""


def share(rank: int) -> list[Case]:
    """Return the simulated cases of one rank."""
    return SIMULATED[SIMULATING.index(rank) :: len(SIMULATING)]
