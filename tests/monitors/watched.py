"""What the tests of the model monitors share: a small transformer and a training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stablekit

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, HEADS, WORDS = 8, 2, 11


@final
class Attention(nn.Module):
    """Two heads, causal, through scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, WIDTH)
        self.wk = nn.Linear(WIDTH, WIDTH)
        self.wv = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.wq, self.wk, self.wv)
        )
        made = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return made.transpose(1, 2).flatten(2)


@final
class Block(nn.Module):
    """Attention and a layer on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        result: Tensor = x + self.mlp(x)
        return result


@final
class Transformer(nn.Module):
    """Words to logits; checkpointing is "" (none), "reentrant" or "plain"; two views of a row."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.head = nn.Linear(WIDTH, WORDS)
        self.checkpointing = checkpointing

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        likeness = (self.first(x.mean(1)) * self.second(x[:, 0])).sum(1)
        result: Tensor = self.head(x) + likeness[:, None, None]
        return result


def words(number: int, rows: int = 3) -> Tensor:
    """Return a batch of five words a row."""
    make = torch.Generator().manual_seed(number)
    return torch.randint(0, WORDS, (rows, 5), generator=make)


def backward(model: nn.Module, number: int = 0) -> None:
    """Make gradients from one batch."""
    batch = words(number)
    logits = model(batch)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.roll(-1, 1).flatten())
    torch.autograd.backward(loss)


@final
class Run:
    """A model in training with monitors, SGD at a constant rate."""

    def __init__(
        self,
        *monitors: Any,  # noqa: ANN401 - any plugin form
        model: nn.Module | None = None,
        attached: nn.Module | None = None,
        make: Callable[[Any], torch.optim.Optimizer] | None = None,
        **options: Any,  # noqa: ANN401 - options of attach
    ) -> None:
        self.model: Any = Transformer() if model is None else model
        made = make or (lambda params: torch.optim.SGD(params, lr=0.1))
        self.optimizer = made(self.model.parameters())
        self.session: stablekit.Session | None = None
        if monitors:
            known = self.model if attached is None else attached
            self.session = stablekit.attach(self.optimizer, *monitors, model=known, **options)
        self.number = 0

    def step(self, *batches: int) -> dict[str, float]:
        """Train on batches, one micro-batch each, and return the metrics."""
        self.number += 1
        self.optimizer.zero_grad()
        for batch in batches or (self.number,):
            backward(self.model, batch)
        self.optimizer.step()
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        return {} if self.session is None else self.session.metrics()

    def events(self, kind: str) -> list[stablekit.Event]:
        self.metrics()
        assert self.session is not None
        return [event for event in self.session.events if event.kind == kind]


def outputs_of(
    model: nn.Module, names: list[str], *batches: int, call: nn.Module | None = None
) -> list[list[Any]]:
    """Return what modules put out for each batch, by hooks of our own; nothing is trained."""
    seen: list[list[Any]] = [[] for _ in names]

    def keep(place: int) -> Callable[..., None]:
        return lambda module, inputs, output: seen[place].append(output)

    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(keep(i)) for i, n in enumerate(names)]
    with torch.no_grad():
        for batch in batches:
            (call or model)(words(batch))
    for handle in handles:
        handle.remove()
    return seen


def hooks_in(model: nn.Module) -> int:
    """Return how many hooks there are on all modules of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    more = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in (*kinds, *more))
