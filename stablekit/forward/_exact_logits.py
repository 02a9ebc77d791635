"""The largest attention logits themselves, seen where attention is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit.forward._attention_layers import refuse_opaque
from stablekit.forward._scores import Scores
from stablekit.forward._slots import Slots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stablekit.forward._sampling import Sampling

__all__ = ["ExactLogits"]

_READABLE = ("eager", "sdpa")


@final
class ExactLogits:
    """A function mode that is on while an attention module computes in a sampled step.

    Not inside ``torch.compile``, whose graphs hold no such mode.

    Example:
        >>> import stablekit
        >>> from stablekit.forward import Sampling
        >>> class Attention(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(super().forward(x), x, x)
        >>> model, sampling = Attention(2, 2), Sampling(every=1)
        >>> exact = ExactLogits(model, {"attn": model}, sampling, heads=[3])
        >>> sampling.attach(stablekit.attach(torch.optim.SGD(model.parameters())))
        >>> _ = model(torch.ones(1, 3, 4, 2))
        >>> exact.take(reduce=False).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        sampling: Sampling,
        heads: Sequence[int] | None = None,
    ) -> None:
        """Listen to attention modules.

        Args:
            model: what they are in.
            layers: they by name.
            sampling: says when to look.
            heads: how many heads each has, to keep them apart; 1 keeps the largest of all, as None.

        Raises:
            AttachError: Their implementation does not show its logits.
        """
        self.names = tuple(layers)
        for name, module in layers.items():
            refuse_opaque(model, name)
            _refuse_hidden(name, module)
        heads = [1] * len(layers) if heads is None else heads
        peaks, device = max(heads, default=1), modules.device_of(model)
        self._slots = Slots(sampling, len(layers), peaks=peaks, device=device)
        for slot, module in enumerate(layers.values()):
            gate = _Gate(self._slots, slot, heads[slot])
            sampling.before(module, gate.enter)
            sampling.after(module, gate.leave, always_call=True)

    def take(self, *, reduce: bool) -> Tensor:
        """Return the largest ``[layers, heads]`` since the last call, -inf where none was seen."""
        return self._slots.take(reduce=reduce)

    def drop(self) -> None:
        """Forget what was seen since the last call."""
        self._slots.clear()


@final
class _Gate:
    """Turns the mode on before one module's forward and off after it, also where that raises."""

    def __init__(self, slots: Slots, slot: int, heads: int) -> None:
        self.slots, self.slot, self.heads = slots, slot, heads
        self.scores: Scores | None = None

    def enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ANN401 - any module's
        if not torch.compiler.is_compiling() and self.slots.sampling.looks_at(module):
            self.scores = Scores(self._keep)
            self.scores.__enter__()  # type: ignore[no-untyped-call]  # torch is not annotated here

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - any module's
        if self.scores is not None:
            self.scores.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
            self.scores = None

    def _keep(self, found: Tensor) -> None:
        if self.heads == 1:
            found = found.amax().view(1)
        elif found.numel() != self.heads:
            raise AttachError(
                f"an attention layer of {self.heads} heads computes {found.numel()} of them: tell"
                " their length with head_dim=; heads spread by tensor parallelism are not supported"
            )
        with torch.no_grad():
            row = self.slots.row()
            row[: found.numel()] = found.detach()
            self.slots.put(self.slot, row)

    def __reduce__(self) -> tuple[type[_Gate], tuple[Slots, int, int]]:
        return _Gate, (self.slots, self.slot, self.heads)


def _refuse_hidden(name: str, module: Any) -> None:  # noqa: ANN401 - an attention module
    config = getattr(module, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind is not None and kind not in _READABLE:
        raise AttachError(
            f"the logits of {name} cannot be seen: its implementation is {kind!r}. Use"
            f" the bound, or load the model with attn_implementation={_READABLE[1]!r}"
        )
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None:
        raise AttachError(
            f"the logits of {name} are soft-capped at {cap} before the softmax, so the largest one"
            " that can be seen says nothing; use the bound, which is about those before the cap"
        )
