"""How large attention logits get: past some tens the softmax is one-hot and gradients vanish.

Dehghani et al.: Scaling Vision Transformers to 22 Billion Parameters (arXiv 2302.05442); Kimi Team:
Kimi K2 (arXiv 2507.20534), whose QK-Clip acts on logits above 100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from stablekit import hookimpl
from stablekit.arguments import choice, flag, number, plugin_name, whole
from stablekit.forward import (
    BoundedLogits,
    ExactLogits,
    Sampling,
    known_layers,
    largest,
    largest_logit,
    logit_bound,
    modules,
    named_layers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from stablekit import Session, Step
    from stablekit.forward import AttentionLayer

__all__ = ["AttentionMonitor", "largest_logit", "logit_bound"]


@final
class AttentionMonitor:
    """Record the largest attention logit of every layer, or a bound on it, in one step of so many.

    The logit of a pair is ``scale * q . k``, of all heads, sequences and micro-batches of the step,
    over all ranks; of soft-capped attention the one before the cap. Forward passes in evaluation
    mode or without gradients are not looked at.

    mode "bound": no logit is larger than ``scale * max |q_i| * max |k_j|`` of its head
    (:func:`logit_bound`), read off the outputs of the projections, or of the query and key norms
    where there are some: RoPE does not change lengths, what YaRN adds is multiplied in. Works with
    any attention kernel, under ``torch.compile``, and costs one read of queries and keys. It is
    larger than the largest logit, usually 1 to 4 times, and counts padding and masked pairs.

    mode "exact": the logits themselves (:func:`largest_logit`), without masked pairs and without
    queries that are padding, where the model calls ``scaled_dot_product_attention`` or writes the
    softmax out ("sdpa", "eager" of transformers); computed once more for that, in parts of 64 MB.
    Inside ``torch.compile`` it sees nothing and says so.

    Metrics, in nats: ``<name of the attention module>`` (of the module that makes queries, where
    those are named), and ``largest``. Healthy: some tens or less. QK-Clip acts at 100; what goes on
    growing from there has been seen to diverge. NaN: no training batch was seen. Infinite: one was
    not finite.

    Event "unseen": nothing was seen in the first sampled step.

    Finds the attention layers of LLaMA, Mistral, Mixtral, Qwen2, Qwen3, Gemma 1 to 3, OLMo 2,
    SmolLM3 and GPT-2 in transformers; in any other model they must be named.

    Args:
        every: sample the steps whose number this divides, at least 1.
        mode: "bound" or "exact".
        layers: with mode "exact", names of the attention modules, in which ``*`` stands for one
            part. They must attend within one sequence.
        query: with mode "bound", names of the modules whose outputs are queries
            ("blocks.*.attn.wq"), ``[..., T, heads * head_dim]``.
        key: likewise of those that make keys, as many.
        head_dim: length of a query; None takes the whole output for one head.
        scale: what products are multiplied by; None is ``head_dim ** -0.5``.
        reduce: agree with all ranks, which costs one reduction in a sampled step. Must be False
            where ranks hold different layers (pipeline parallelism).
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or does not go with the others.

    Example:
        >>> import stablekit
        >>> model = torch.nn.ModuleDict({"wq": torch.nn.Linear(2, 4), "wk": torch.nn.Linear(2, 4)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = AttentionMonitor(every=1, query="wq", key="wk", head_dim=2)
        >>> session = stablekit.attach(optimizer, monitor, model=model)
        >>> x = torch.randn(1, 5, 2)
        >>> logits = model["wq"](x) @ model["wk"](x).mT
        >>> logits.sum().backward()
        >>> optimizer.step()
        >>> session.metrics()["attention-monitor/wq"] >= 0
        True
    """

    needs = ("model",)
    cost = (
        "in sampled steps one read of queries and keys (bound) or all logits once more (exact) and"
        " one reduction over ranks; otherwise one flag for each layer"
    )

    def __init__(
        self,
        every: int = 100,
        *,
        mode: str = "bound",
        layers: str | None = None,
        query: str | None = None,
        key: str | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.mode = choice("mode", mode, ("bound", "exact"))
        self.layers = modules.pattern("layers", layers)
        self.query, self.key = modules.pattern("query", query), modules.pattern("key", key)
        self.head_dim = None if head_dim is None else whole("head_dim", head_dim, at_least=1)
        self.scale = None if scale is None else number("scale", scale, above=0)
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "attention-monitor")
        self._check()
        self._sampling = Sampling(self.every)
        self._logits: BoundedLogits | ExactLogits | None = None

    def _check(self) -> None:
        if (self.query is None) != (self.key is None):
            raise ValueError(f"name both, got query={self.query!r} and key={self.key!r}")
        if self.query is None and (self.head_dim is not None or self.scale is not None):
            raise ValueError("head_dim and scale go with query= and key=, which are not given")
        if self.query is not None and self.mode == "exact":
            raise ValueError("query= and key= go with mode='bound'; mode='exact' takes layers=")
        if self.layers is not None and self.mode == "bound":
            raise ValueError("layers= goes with mode='exact'; mode='bound' takes query= and key=")

    @classmethod
    def example(cls) -> AttentionMonitor:
        """Return one that takes any model's output for queries and for keys."""
        return cls(every=1, query="", key="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Find the layers and listen to them."""
        model = modules.model_of(session, self.name)
        if self.mode == "exact":
            self._logits = ExactLogits(model, self._attention(model), self._sampling)
        else:
            self._logits = BoundedLogits(model, self._projections(model), self._sampling)
        self._sampling.attach(session)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what a sampled step saw."""
        if self._sampling.is_armed and self._logits is not None:
            found = self._logits.take(reduce=self.reduce).amax(1)
            seen = found > -torch.inf
            shown = torch.where(seen, found, torch.nan).unbind()
            for name, value in zip(self._logits.names, shown, strict=True):
                step.record(name or "model", value)
            step.record("largest", largest(found, seen))
            what, compiles = "no attention layer saw a training batch", self.mode == "bound"
            self._sampling.complain(step, seen, what, compiles=compiles)
        self._sampling.arm(step.number)

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._sampling.detach()
        self._logits = None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is sampled."""
        return self._sampling.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: A field is not a bool.
        """
        self._sampling.load_state_dict(state)

    def _attention(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.layers is not None:
            return modules.matching(model, self.layers, argument="layers")
        return {layer.name: module for layer, module in known_layers(model).items()}

    def _projections(self, model: nn.Module) -> list[AttentionLayer]:
        if self.query is None or self.key is None:
            return [*known_layers(model)]
        return named_layers(model, self.query, self.key, head_dim=self.head_dim, scale=self.scale)
