"""A run of 60 steps with faults that saves checkpoints; another process resumes it from each.

``python -m tests.state.resumable save FOLDER`` writes checkpoints and the end of each run;
``python -m tests.state.resumable resume FOLDER`` goes on from each and prints what differs.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stablekit
from stablekit_recovery import NonFiniteGuard

STEPS = 60
SAVED = (1, 7, 24, 25, 26, 30, 38, 59)  # a spike comes after 30
MODES = {"host": False, "device": True}
RESUMED = {
    "host": [*((step, "") for step in SAVED), (26, "compile"), (38, "ddp")],
    "device": [(7, ""), (24, ""), (30, ""), (38, "")],
}
# Besides every plugin as it is by default: short warm-ups and windows that wrap around.
VARIANTS = (
    "adagc:warmup_steps=10,beta=0.5",
    "adagc:warmup_steps=30,warmup_norms=clipped,lambda_rel=1.5",
    "autoclip:history=9,percentile=70",
    "quantile-clip:history=9",
    "quantile-clip:history=9,per_tensor=true",
    "zclip:warmup_steps=5,max_grad_norm=none,alpha=0.5",
    "zclip:warmup_steps=10,max_grad_norm=none,mode=percentile,skip_update_on_spike=true",
)


def runs() -> list[tuple[str, str]]:
    """Return which plugins run in which mode."""
    names = stablekit.available()
    modes = [(name, mode) for name in names for mode in MODES]
    return modes + [(name, "host") for name in VARIANTS]


class Network(nn.Sequential):
    """Two linear layers and, beside them, the module that judges what they put out."""

    def __init__(self) -> None:
        layers = {"0": nn.Linear(5, 6), "1": nn.Tanh(), "2": nn.Linear(6, 3)}
        super().__init__(OrderedDict(loss=nn.CrossEntropyLoss(), **layers))

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = x if name == "loss" else layer(x)
        return x


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """Wrap a model so that its parameters have other names."""
    if how == "compile":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]  # a module
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    return model


def acts_on_losses(session: stablekit.Session) -> bool:
    """Tell whether some plugin waits for forward passes."""
    return any("loss" in getattr(plugin, "needs", ()) for plugin in session.plugins.values())


def compute_loss(session: stablekit.Session, step: int) -> None:
    """Pass a batch through the model, and back, for plugins that act there."""
    model: Any = session.model
    if acts_on_losses(session):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(1000 + step))
        model.loss(model(batch), torch.arange(4) % 3).backward()


def set_gradients(model: nn.Module, step: int) -> None:
    """Give every parameter the gradient it has in this step, faults included."""
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(model.parameters()):
        gradient = torch.randn(param.shape, generator=generator) * 0.1
        if step in (12, 30, 31, 50):
            gradient *= 100.0  # a spike
        if step in (5, 16, 25, 26, 40, 41):
            gradient *= 0.0
        if step in (3, 22, 27) and i == 1:
            gradient.view(-1)[0] = math.nan
        if step == 33 and i == 2:
            gradient.view(-1)[0] = math.inf
        if step == 37:
            gradient *= 1e35  # the norm overflows
        is_missing = step == 20 or (i == 2 and step < 15) or (i == 0 and 44 <= step < 48)
        param.grad = None if is_missing else gradient


def plugin_named(name: str) -> Any:  # noqa: ANN401 - a plugin or a string
    """Return a plugin of the catalogue, or one made from a string with keywords."""
    if ":" in name:
        return name
    info = stablekit.available()[name]
    module, _, cls = info.entry_point.partition(":")
    factory = getattr(importlib.import_module(module), cls)
    return factory.example() if hasattr(factory, "example") else factory()


def attached(
    name: str, mode: str, how: str = ""
) -> tuple[nn.Module, torch.optim.Optimizer, stablekit.Session]:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=mode == "device")
    plugin = plugin_named(name)
    chain = [plugin] if isinstance(plugin, NonFiniteGuard) else [NonFiniteGuard(), plugin]
    session = stablekit.attach(
        optimizer, *chain, model=wrapped(model, how), device_mode=MODES[mode], log_every=1
    )
    return model, optimizer, session


def end_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: stablekit.Session
) -> dict[str, Any]:
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "metrics": session.metrics(),
        "events": [event.as_dict() for event in session.events],
        "summary": session.summary(),
    }


def save(folder: Path) -> None:
    for name, mode in runs():
        model, optimizer, session = attached(name, mode)
        for step in range(1, STEPS + 1):
            compute_loss(session, step)
            set_gradients(model, step)
            optimizer.step()
            if step in SAVED:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(saved, folder / f"{name}-{mode}-{step}.pt")
        torch.save(end_of(model, optimizer, session), folder / f"{name}-{mode}-end.pt")


def resume(folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for name, mode in runs():
        end = torch.load(folder / f"{name}-{mode}-end.pt", weights_only=True)
        for step, how in RESUMED[mode]:
            if how and (name in VARIANTS or "loss" in getattr(plugin_named(name), "needs", ())):
                continue  # what is kept by name is the same for variants; of losses nothing is
            path = folder / f"{name}-{mode}-{step}.pt"
            ours = resumed(name, mode, how, path, step)
            for where in differences(ours, end, ""):
                print(f"{name} ({mode}) from step {step} {how}: {where}")
    torch.distributed.destroy_process_group()


def resumed(name: str, mode: str, how: str, path: Path, step: int) -> dict[str, Any]:
    model, optimizer, session = attached(name, mode, how)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for later in range(step + 1, STEPS + 1):
        compute_loss(session, later)
        set_gradients(model, later)
        optimizer.step()
    return end_of(model, optimizer, session)


def differences(left: object, right: object, path: str) -> list[str]:
    """Return the places at which two nested values are not the same bits."""
    if isinstance(left, dict) and isinstance(right, dict):
        odd = [f"{path}.{key}" for key in left.keys() ^ right.keys()]
        return odd + [
            d
            for k in left.keys() & right.keys()
            for d in differences(left[k], right[k], f"{path}.{k}")
        ]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}[{i}]")]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [f"{path}: {left} is not {right}"]
    both_nan = left != left and right != right
    return (
        []
        if both_nan or (type(left) is type(right) and left == right)
        else [f"{path}: {left!r} is not {right!r}"]
    )


if __name__ == "__main__":
    {"save": save, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))
