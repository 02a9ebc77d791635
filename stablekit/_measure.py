"""Norms of tensors that are not gradients but lie where the parameters lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablekit import _norms
from stablekit._sharding import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablekit._layout import Layout


def norms_of(
    tensors: Sequence[Tensor | None], layout: Layout, chosen: tuple[int, ...] | None
) -> Tensor:
    """Return L2 norms of tensors placed like the parameters at these positions, float32.

    One reduction for each span of ranks that parameters are cut over.
    """
    positions = layout.everywhere if chosen is None else chosen
    norms = torch.zeros(len(layout.names), device=layout.device)
    held = [
        (i, local(one.detach()))
        for i, one in zip(positions, tensors, strict=True)
        if one is not None
    ]
    if held:
        read = _norms.tensor_norms([data for _, data in held]).to(layout.device)
        norms = norms.index_copy(0, layout.subset(tuple(i for i, _ in held)), read)
    nothing = torch.empty(0, device=layout.device)
    for span in layout.spans:
        if not span.members.isdisjoint(positions):
            (agreed,), _ = span.join([span.own(norms[span.index])], nothing)
            norms = norms.index_copy(0, span.index, agreed)
    return norms if chosen is None else norms[layout.subset(chosen)]
