"""Attention logits as they are: queries, keys and masks on their way into the softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Scores", "largest_logit", "largest_logits"]

_AT_ONCE = 1 << 24


def largest_logit(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the largest logit of all heads, 0-dim float32; see :func:`largest_logits`.

    Example:
        >>> x = torch.tensor([[[[1.0], [2.0], [3.0]]]])
        >>> largest_logit(x, -x, is_causal=True), largest_logit(x, x, is_causal=True)
        (tensor(-1.), tensor(9.))
    """
    return largest_logits(query, key, mask, is_causal=is_causal, scale=scale).amax()


def largest_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the largest ``scale * q_i . k_j`` of each head over the pairs that attend, float32.

    Queries that may not attend to themselves are padding and are left out, with all their pairs.

    Args:
        query: ``[batch, heads, T, d]``.
        key: ``[batch, key heads, S, d]``; each serves ``heads / key heads`` query heads.
        mask: what ``scaled_dot_product_attention`` takes: bool, true where a pair attends, or a
            float that is added, of any shape that broadcasts to ``[batch, heads, T, S]``.
        is_causal: whether query i attends to keys 0 to i, in place of a mask.
        scale: None is ``d ** -0.5``.

    Returns:
        ``[heads]``; -inf where no pair attends.

    Example:
        >>> x = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]])
        >>> largest_logits(x, x, scale=0.5)
        tensor([2., 8.])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    best = torch.full((query.shape[1],), -torch.inf, device=query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for place, logits in _in_parts(query.detach(), key.detach(), scale):
            allowed = _masked(logits, mask, place, (*query.shape[:-1], key.shape[-2]))
            if mask is None and is_causal:
                allowed = _causal(logits, place)
            best = torch.maximum(best, allowed.amax((1, 2)))
    return best


def _in_parts(
    query: Tensor, key: Tensor, scale: float
) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Yield logits of some queries of one sequence at a time, float32 ``[heads, rows, S]``."""
    rows = max(1, _AT_ONCE // (key.shape[1] * key.shape[2]))
    for b in range(query.shape[0]):
        for start in range(0, query.shape[2], rows):
            part = slice(start, start + rows)
            yield (b, part), query[b, :, part].float() @ key[b].float().mT * scale


def _masked(
    logits: Tensor, mask: Tensor | None, place: tuple[int, slice], shape: tuple[int, ...]
) -> Tensor:
    """Return logits plus the mask, -inf where a pair does not attend or a query is padding."""
    if mask is None:
        return logits
    b, part = place
    full = mask.detach().expand(shape)
    own = full[b, :, part]
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~own, -torch.inf)
    else:
        logits = (logits + own).masked_fill(own <= _lowest(mask), -torch.inf)
    if shape[-1] != shape[-2]:
        return logits
    diagonal = full[b].diagonal(dim1=-2, dim2=-1)[:, part]
    attends = diagonal if mask.dtype == torch.bool else diagonal > _lowest(mask)
    return logits.masked_fill(~attends.unsqueeze(-1), -torch.inf)


def _causal(logits: Tensor, place: tuple[int, slice]) -> Tensor:
    rows = torch.arange(logits.shape[1], device=logits.device) + place[1].start
    columns = torch.arange(logits.shape[2], device=logits.device)
    return logits.masked_fill(columns > rows.unsqueeze(1), -torch.inf)


def _lowest(mask: Tensor) -> float:
    """Return what is low enough in an additive mask to mean no attention."""
    return torch.finfo(mask.dtype).min / 2


@final
class Scores(TorchFunctionMode):
    """Tells ``keep`` the largest logits, ``[heads]``, of every attention computed within a block.

    Sees ``scaled_dot_product_attention``, and ``softmax`` over masked logits where attention is
    written out.
    """

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        """Keep what is found by calling a function."""
        super().__init__()
        self._keep = keep

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - as torch
        types: Any,  # noqa: ANN401 - as torch
        args: Any = (),  # noqa: ANN401 - as torch
        kwargs: Any = None,  # noqa: ANN401 - as torch
    ) -> Any:  # noqa: ANN401 - as torch
        """Look at the arguments, then call the function as it was called."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._keep(_of_attention(*args, **kwargs))
        elif func is torch.nn.functional.softmax:
            self._keep(_of_softmax(args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)


def _of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.ndim == 3:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
    return largest_logits(query, key, attn_mask, is_causal=is_causal, scale=scale)


def _of_softmax(logits: Tensor) -> Tensor:
    """Return the largest of logits ``[..., heads, T, S]`` to which the mask was added already."""
    logits = logits.detach()
    best = logits.amax(-1)
    if logits.shape[-1] == logits.shape[-2]:
        is_padding = logits.diagonal(dim1=-2, dim2=-1) <= torch.finfo(logits.dtype).min / 2
        best = best.masked_fill(is_padding, -torch.inf)
    best = best.amax(-1).float()
    return best.flatten(0, -2).amax(0) if best.ndim > 1 else best.amax().view(1)
