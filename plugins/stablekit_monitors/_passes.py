"""Which module of a forward pass was the first to put out something that is not finite."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit.forward import modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stablekit.forward import Sampling

__all__ = ["INPUT", "OUTPUT", "Pass", "Passes", "first_bad", "place_of"]

INPUT = "(input)"
"""What a model is given, in place of a module's name."""

OUTPUT = "(output)"
"""What the model itself puts out."""

_NOWHERE = 1 << 40
_A_PASS = 1 << 20


@final
class Pass:
    """The smallest and largest element of every output of one forward pass, in order."""

    def __init__(self, entry: str) -> None:
        """Begin at a module."""
        self.entry = entry
        self.names: list[str] = []
        self._ends: list[Tensor] = []

    def see(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Take in what a module put out; one read and no copy."""
        for tensor in tensors:
            data = _here(tensor)
            if data.numel():
                self.names.append(name)
                self._ends += torch.aminmax(data)

    def first_bad(self, home: torch.device) -> Tensor:
        """Return twice the place of the first output that is not finite, plus 1 if it is NaN."""
        if not self._ends:
            return torch.full((), _NOWHERE, device=home)
        ends = [end.to(home, torch.float32, non_blocking=True) for end in self._ends]
        self._ends = []
        found = torch.stack(ends).view(-1, 2)
        is_bad = ~found.isfinite().all(1)
        place = is_bad.int().argmax().view(1)
        is_nan = found.isnan().any(1).gather(0, place)
        return torch.where(is_bad.any(), 2 * place + is_nan, _NOWHERE).view(())


def first_bad(passes: Sequence[Pass], home: torch.device) -> Tensor:
    """Return where the first output is that is not finite, of all passes: one int64 number."""
    found = [one.first_bad(home) + i * _A_PASS for i, one in enumerate(passes)]
    return torch.stack(found).amin() if found else torch.full((), _NOWHERE, device=home)


def place_of(where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return number of the pass, -1 if there is none; place in it; 1 for NaN and 0 for Inf."""
    is_there = where < _NOWHERE
    number = torch.where(is_there, where // _A_PASS, -1)
    return number, where % _A_PASS // 2, where % 2


def _here(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds; the others look at theirs."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@final
class Passes:
    """The forward passes of a sampled step.

    A pass is one call of the model, or of one of its children where the model itself is not called
    (as Lightning does not). What gradient checkpointing computes again is outside of it.
    """

    def __init__(self, model: nn.Module, watched: dict[str, nn.Module], sampling: Sampling) -> None:
        """Listen to a model, and to the modules to be watched in it."""
        self.sampling = sampling
        self.done: list[Pass] = []
        self._now: Pass | None = None
        entries = {"": model, **dict(model.named_children())}
        for name, module in entries.items():
            sampling.before(module, partial(self._enter, name), with_kwargs=True)
        for name, module in watched.items():
            sampling.after(module, partial(self._see, name))
        for name, module in entries.items():
            sampling.after(module, partial(self._leave, name), always_call=True)

    def take(self) -> list[Pass]:
        """Return the passes since the last call."""
        done, self.done, self._now = self.done, [], None
        return done

    def _enter(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling() or self._now is not None:
            return
        if self.sampling.looks_at(module):
            self._now = Pass(name)
            self._now.see(INPUT, modules.tensors_in((*inputs, *named.values())))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - any module's
        if not torch.compiler.is_compiling() and self._now is not None:
            self._now.see(name, modules.tensors_in(output))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - any module's
        if torch.compiler.is_compiling() or self._now is None:
            return
        if self._now.entry == name:
            self.done.append(self._now)
            self._now = None

    def __reduce__(self) -> tuple[type[Passes], tuple[Any, ...]]:
        """Copy and pickle as one that looks at nothing."""
        return Passes, (nn.Identity(), {}, type(self.sampling)(self.sampling.every))
