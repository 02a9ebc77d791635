"""A bound on attention logits from the lengths of queries and keys, whatever computes attention."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit.forward._attention_layers import rope_gain, ropes_in
from stablekit.forward._slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablekit.forward._attention_layers import AttentionLayer
    from stablekit.forward._sampling import Sampling

__all__ = ["BoundedLogits", "logit_bound"]


def logit_bounds(queries: Tensor, keys: Tensor) -> Tensor:
    """Return ``max |q_i| * max |k_j|`` of every head; arguments as of :func:`logit_bound`."""
    seen = (queries >= 0) & (keys >= 0)
    return torch.where(seen, queries * keys, -torch.inf)


def logit_bound(queries: Tensor, keys: Tensor) -> Tensor:
    """Return ``max |q_i| * max |k_j|``, the larger of all heads: no product ``q . k`` exceeds it.

    Args:
        queries: the largest norm of a query in each head, ``[..., heads]``; below 0 where there
            was none.
        keys: likewise of a key.

    Example:
        >>> logit_bound(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(3.)
    """
    return logit_bounds(queries, keys).amax(-1)


@final
class BoundedLogits:
    """The largest norms of queries and keys in every head of every layer.

    Example:
        >>> import stablekit
        >>> from stablekit.forward import Sampling, named_layers
        >>> model = nn.ModuleDict({"wq": nn.Linear(2, 4), "wk": nn.Linear(2, 4)})
        >>> sampling = Sampling(every=1)
        >>> layers = named_layers(model, "wq", "wk", head_dim=2)
        >>> bounds = BoundedLogits(model, layers, sampling)
        >>> sampling.attach(stablekit.attach(torch.optim.SGD(model.parameters())))
        >>> _ = model["wq"](torch.ones(1, 3, 2)), model["wk"](torch.ones(1, 3, 2))
        >>> bounds.take(reduce=False).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        sampling: Sampling,
        *,
        strict: bool = False,
    ) -> None:
        """Listen to what makes queries and keys.

        Args:
            model: what the layers are in.
            layers: where to listen.
            sampling: says when to look.
            strict: refuse, in the forward pass, a layer of which this rank sees some heads only.
        """
        self.names = tuple(layer.name for layer in layers)
        self._ropes = ropes_in(model)
        self._heads = max(layer.heads for layer in layers)
        self._slots = Slots(
            sampling, len(layers), peaks=2 * self._heads, device=modules.device_of(model)
        )
        for slot, layer in enumerate(layers):
            sides = {0: layer.query} if layer.is_fused else {0: layer.query, 1: layer.key}
            for side, module in sides.items():
                self._slots.watch(slot, module, partial(_look, layer, self._heads, side, strict))

    def take(self, *, reduce: bool) -> Tensor:
        """Return the bounds ``[layers, heads]`` since the last call, -inf where none was seen."""
        queries, keys = self._slots.take(reduce=reduce).chunk(2, dim=1)
        return logit_bounds(queries, keys) * rope_gain(self._ropes) ** 2

    def drop(self) -> None:
        """Forget what was seen since the last call."""
        self._slots.clear()


def _look(
    layer: AttentionLayer,
    heads: int,
    side: int,
    strict: bool,
    output: Any,  # noqa: ANN401 - any module's
) -> Tensor | None:
    """Return norms of queries (side 0), times the scale, of keys (side 1), or of both."""
    tensors = modules.tensors_in(output)
    if not tensors or not tensors[0].numel():
        return None
    made = modules.whole(tensors[0])
    parts = made.chunk(3, dim=-1)[:2] if layer.is_fused else (made,)
    row = torch.full((2, heads), -torch.inf, device=made.device)
    for place, part in enumerate(parts, start=side):
        norms = _head_norms(part, layer)
        if strict and place == 0 and norms.numel() not in (1, layer.heads):
            raise AttachError(
                f"{layer.name} makes queries of {norms.numel()} heads and not of {layer.heads};"
                " heads spread by tensor parallelism are not supported"
            )
        norms = norms.repeat_interleave(max(1, layer.heads // norms.numel()))
        row[place, : norms.numel()] = norms
    length = layer.head_dim or parts[0].shape[-1]
    row[0] *= length**-0.5 if layer.scale is None else layer.scale
    return row.flatten()


def _head_norms(x: Tensor, layer: AttentionLayer) -> Tensor:
    """Return the largest norm in each head; one for all where heads are a dim of their own.

    Which dim that is differs: Qwen3 normalises ``[batch, T, heads, d]``, Gemma 3 ``[batch, heads,
    T, d]``. There all heads share one gain, so little is lost.
    """
    length = layer.head_dim or x.shape[-1]
    heads = x.unflatten(-1, (-1, length)).flatten(0, -3)
    kind = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(heads, dim=-1, dtype=kind).float().amax(0)
    return norms if x.ndim <= 3 and layer.heads > 1 else norms.amax().view(1)
