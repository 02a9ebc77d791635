"""What the tests of the core share: a small model, a diary, and a full picture of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stablekit import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stablekit import Event, Session, Step

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))


def small_model() -> nn.Sequential:
    """Return the same two-layer model every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def backward(model: nn.Module, step: int = 0, *, gain: float = 1.0) -> Tensor:
    """Make the gradients of one step; larger from step to step, so that clippers have work."""
    model.zero_grad()
    loss = nn.functional.mse_loss(model(X.roll(step, 0)), Y) * (1 + step) * gain
    loss.backward()
    return loss.detach()


def parameters_after(
    steps: int, optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[Tensor]:
    """Train and return copies of the parameters."""
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return copies(model.parameters())


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


def gradients(model: nn.Module) -> list[Tensor]:
    """Return copies of the gradients."""
    return copies(param.grad for param in model.parameters() if param.grad is not None)


def set_gradients(params: Iterable[Tensor], *values: float) -> None:
    """Give every parameter a gradient filled with one value, the last one for all that follow."""
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, values[min(i, len(values) - 1)])


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Compare bit by bit; NaN equals NaN."""
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))
        for a, b in zip(left, right, strict=True)
    )


def picture(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return everything that hangs on an optimizer, parameters and inner optimizers included.

    Parameters are shown by value where they stand in a group and by number elsewhere; hooks are
    left out.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        "params": copies(params),
        "random": torch.get_rng_state(),
        "attributes": _shown(
            vars(optimizer), {id(p): i for i, p in enumerate(params)}, (optimizer,)
        ),
    }


def _shown(value: Any, numbers: Mapping[int, int], above: tuple[object, ...]) -> Any:
    if id(value) in numbers:
        return f"parameter {numbers[id(value)]}"
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.optim.Optimizer):
        known = any(value is one for one in above)
        return "itself" if known else _shown(vars(value), numbers, (*above, value))
    if isinstance(value, dict):
        return {
            f"parameter {numbers[id(k)]}" if id(k) in numbers else k: _shown(v, numbers, above)
            for k, v in value.items()
            if not (isinstance(k, str) and k.endswith("_hooks"))
        }
    if isinstance(value, (list, tuple, set)):
        return [_shown(item, numbers, above) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(type(value))


def difference(left: Any, right: Any, path: str = "") -> str:
    """Return the path to the first difference of two pictures, empty where there is none."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and equal([left], [right])
        return "" if same else f"{path}: {left} is not {right}"
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return f"{path}: keys {list(left)} are not {list(right)}"
        pairs = [(f"{path}.{key}", left[key], right[key]) for key in left]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(left, right, strict=True))]
    else:
        same = type(left) is type(right) and (left == right or (left != left and right != right))
        return "" if same else f"{path}: {left!r} is not {right!r}"
    return next((found for p, a, b in pairs if (found := difference(a, b, p))), "")


class Diary:
    """Writes down every hook it hears of, and the gradient norm it sees there."""

    def __init__(self, name: str = "diary", pages: list[str] | None = None) -> None:
        self.name = name
        self.pages = pages if pages is not None else []
        self.steps: list[tuple[int, int]] = []
        self.evaluations: list[int] = []
        self.losses: list[float | None] = []
        self.seen: list[float] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def _note(self, hook: str) -> None:
        self.pages.append(f"{self.name}.{hook}" if self.name != "diary" else hook)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        self._note("on_attach")

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        self._note("observe_gradients")
        self.steps.append((step.number, step.updates))
        self.losses.append(None if step.loss is None else step.loss.item())

    @hookimpl
    def on_skip(self, step: Step) -> None:
        self._note("on_skip")

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        self._note("transform_gradients")
        self.evaluations.append(step.evaluation)

    @hookimpl
    def after_update(self, step: Step) -> None:
        self._note("after_update")

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        self._note("on_step_end")

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        self._note(f"on_event:{event.kind}")

    @hookimpl
    def on_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        self._note("on_metrics")
        self.metrics[number] = dict(metrics)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        self._note("on_detach")


class BeforeUpdate:
    """Keeps the gradients that the optimizer is about to see."""

    def __init__(self, name: str = "before-update") -> None:
        self.name = name
        self.seen: list[list[Tensor]] = []
        self.norms: list[float] = []

    @hookimpl
    def before_update(self, step: Step) -> None:
        self.seen.append(copies(p.grad for p in step.parameters if p.grad is not None))
        self.norms.append(step.gradients.norm().item())
