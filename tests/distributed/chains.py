"""Which plugins are attached in the runs, and what watches them."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from torch.utils._python_dispatch import TorchDispatchMode

import stablekit
from stablekit import hookimpl
from stablekit.testing import factory_of

if TYPE_CHECKING:
    from stablekit import Step

Chain = Callable[[], list[Any]]

GUARD = "nonfinite-guard"
EVERYTHING = "everything"
CLIPPERS = "all clippers"
CUT_BY_COLUMNS = ("agc", "clip-value after agc", "quantile-clip of each tensor", CLIPPERS)
"""Chains that see more than the global norm, which is the same however tensors are cut."""

_SKIPS = {"window": 8, "warmup_steps": 4, "max_consecutive": 1}
_RETURNS = {"every": 1, "keep": 1, "calm": 1, "patience": 2}
_PARTS_OF_ESCALATION = ("lr-backoff", "rollback", "skip-spikes")
EAGER: dict[str, Callable[[], dict[str, Any]]] = {
    "spam": lambda: {
        "grad_accu_steps": 2,
        "warmup_steps": 2,
        "reset_interval": 4,
        "threshold": 5.0,
    },
    "stable-spam": lambda: {"reset_interval": 4},
    "attention-monitor": lambda: {"every": 1, "query": "query", "key": "key"},
    "qk-clip": lambda: {"threshold": 0.5, "logits": "bound", "query": "query", "key": "key"},
    "logit-clip": lambda: {"tau": 0.5, "on": ""},
    "soft-cap": lambda: {"cap": 1.0, "on": ""},
    "z-loss": lambda: {"weight": 0.1, "on": ""},
    "error-norm-truncation": lambda: {
        "fraction": 0.5,
        "warmup_steps": 1,
        "divisor": "kept",
        "on": "loss",
    },
    "logit-scale-clamp": lambda: {"max_scale": 2.0},
    "weight-clip": lambda: {"limit": 0.34},
    "skip-spikes": lambda: _SKIPS,
    "rollback": lambda: _RETURNS,
    "escalation": lambda: {
        "skip": stablekit.create("skip-spikes", **_SKIPS),
        "rollback": stablekit.create("rollback", **_RETURNS),
    },
}
"""Arguments that make a plugin act in as few steps as these runs have."""

WHOLE_ONLY = ("gradient-penalty",)
"""Plugins that refuse parameters that are sharded; tests of their own train them under DDP."""

SPEAKING = {
    "spike-monitor": "spike",
    "skip-spikes": "skip",
    "lr-backoff": "lr-backoff",
    "rollback": "rollback",
    "escalation": "rollback",
}
"""Plugins that act on what happens, and the event that shows it."""


@final
class Probe:
    """Writes down what every step was; reads norms at its end, which may measure again."""

    name = "probe"

    def __init__(self, *, largest: bool = True) -> None:
        """Start with an empty sheet.

        Args:
            largest: look at the largest elements too, which is a reduction of its own.
        """
        self.seen: list[dict[str, Any]] = []
        self._reads_largest = largest

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Note norms, loss and decision."""
        gradients = step.gradients
        seen = {
            "raw": gradients.raw_norms(),
            "norms": gradients.norms(),
            "norm": gradients.norm(),
            "present": gradients.present,
            "loss": step.loss,
            "ok": step.ok,
        }
        if self._reads_largest:
            seen["largest"] = gradients.amaxes()
        self.seen.append(seen)


@final
class LossReader:
    """Asks for the loss of every step."""

    name = "loss-reader"

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record it."""
        if step.loss is not None:
            step.record("loss", step.loss)


@final
class Collectives(TorchDispatchMode):
    """Counts operations of torch.distributed, by name."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Run the operation."""
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def plugin_named(name: str) -> Any:  # noqa: ANN401 - any plugin
    """Return a plugin of the catalogue that acts early."""
    factory = _factory_of(name)
    return factory(**EAGER[name]()) if name in EAGER else factory()


@functools.cache
def catalogue() -> tuple[str, ...]:
    """Return the names of all plugins that take shards, looked up once."""
    return tuple(name for name in stablekit.available() if name not in WHOLE_ONLY)


def clippers() -> list[str]:
    """Return the names of those that change gradients and nothing else."""
    found = stablekit.available().values()
    names = [info.name for info in found if info.entry_point.startswith("stablekit_clipping:")]
    return [name for name in names if "parameters" not in getattr(plugin_named(name), "needs", ())]


@functools.cache
def _factory_of(name: str) -> Callable[..., Any]:
    """Return what makes a plugin, looked up once."""
    return _class_of(name) if name in EAGER else factory_of(name)


def chains() -> dict[str, Chain]:
    """Return the chains that are trained with: each plugin, variants of some, all together."""

    def one(name: str) -> Chain:
        return lambda: [GUARD] if name == GUARD else [GUARD, plugin_named(name)]

    def variant(name: str, **arguments: Any) -> Chain:  # noqa: ANN401 - a plugin's
        return lambda: [GUARD, stablekit.create(name, **arguments)]

    names = catalogue()
    return {
        **{name: one(name) for name in names},
        "zclip, short warm-up": variant("zclip", warmup_steps=3, max_grad_norm=None),
        "adagc, short warm-up": variant("adagc", warmup_steps=2),
        "quantile-clip of each tensor": variant("quantile-clip", per_tensor=True),
        "global-norm of the largest": variant("global-norm", norm_type=float("inf")),
        "agc of small tensors": lambda: [
            GUARD,
            stablekit.only("agc", include=["logit_scale", "*bias"]),
        ],
        "clip-value after agc": lambda: [
            GUARD,
            "agc",
            plugin_named("clip-value"),
            stablekit.create("agc", clipping=0.001, name="again"),
        ],
        CLIPPERS: lambda: [GUARD, *(plugin_named(name) for name in clippers())],
        EVERYTHING: lambda: [
            GUARD,
            *(plugin_named(name) for name in names if name not in (GUARD, *_PARTS_OF_ESCALATION)),
        ],
    }


def scales_by_norms(name: str) -> bool:
    """Tell whether a plugin announces to use norms and loss only, as far as gradients go."""
    return not {"amaxes", "elements", "model", "parameters"} & set(
        getattr(plugin_named(name), "needs", ())
    )


def counted_chains() -> dict[str, Chain]:
    """Return what is attached when collectives are counted: each plugin, some together."""
    names = catalogue()

    def one(name: str) -> Chain:
        return lambda: [plugin_named(name)]

    return {
        "not attached": list,
        **{name: one(name) for name in names},
        "global-norm(norm_type=inf)": lambda: ["global-norm:norm_type=inf"],
        "reads step.loss": lambda: [LossReader()],
        "all that scale by norms": lambda: [plugin_named(n) for n in names if scales_by_norms(n)],
        "agc, clip-value, agc": lambda: ["agc", plugin_named("clip-value"), "agc:name=again"],
    }


def _class_of(name: str) -> Callable[..., Any]:
    module, _, attribute = stablekit.available()[name].entry_point.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found
