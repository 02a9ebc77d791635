"""Keeping attention logits in range by scaling the weights that make queries and keys.

Kimi Team: Kimi K2: Open Agentic Intelligence (arXiv 2507.20534), section 2.1, "QK-Clip". The
reference is Megatron-LM's ``qk_clip.py``. Differences: Megatron scales weights only, so that where
there are biases logits stay above the threshold, here biases are scaled too; there a negative
maximum makes weights NaN, here it changes nothing; there q/k norms undo the clipping, here the
norms' weights are scaled; multi-head latent attention is refused here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import choice, flag, fraction, number, plugin_name, whole
from stablekit.forward import (
    BoundedLogits,
    ExactLogits,
    Sampling,
    largest,
    modules,
)
from stablekit_updates._qk_attention import attention_of, refuse_compiled
from stablekit_updates._qk_gains import clipped_layer
from stablekit_updates._qk_heads import Held, group_factors, scale_heads_

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step

__all__ = ["QKClip", "clip_factors", "group_factors", "scale_heads_"]


def clip_factors(maxima: Tensor, threshold: float) -> Tensor:
    """Return ``threshold / m`` where the largest logit m of a head is above it and finite, else 1.

    Example:
        >>> clip_factors(torch.tensor([200.0, 30.0, -5.0, torch.inf]), 100.0)
        tensor([0.5000, 1.0000, 1.0000, 1.0000])
    """
    return torch.where((maxima > threshold) & maxima.isfinite(), threshold / maxima, 1.0)


@final
class QKClip:
    """Scale down, after every update, queries and keys of heads whose logits exceed a threshold.

    With m the largest logit ``scale * q . k`` of a head in the step, over all micro-batches and
    ranks, and ``gamma = min(1, threshold / m)`` (1 where m is not above 0): the weights and biases
    that make its queries are multiplied by ``gamma ** alpha``, those of its keys by
    ``gamma ** (1 - alpha)``, so that on the same inputs all its logits are multiplied by gamma. Of
    heads that share a key head (GQA) the smallest gamma counts. Values, outputs and the optimizer's
    state are left alone, as in the paper.

    Acts on LLaMA, Mistral, Mixtral, Qwen2, SmolLM3, Gemma 1 and 2 (weights and biases of ``q_proj``
    and ``k_proj``), GPT-2 (parts of ``c_attn``), and on the norms of queries and keys where there
    are some, which would undo anything else: OLMo 2 head by head; Qwen3 and Gemma 3, where all
    heads share one norm, with one gamma for the layer. Any other model works if the modules that
    make queries and keys are named: linear layers, norms, or sequences that end in one.

    Refused: multi-head latent attention (DeepSeek, Kimi K2), whose rotary part must be scaled in
    another way; LoRA and other adapters, parametrized, quantised, frozen weights, and weights that
    are used in two places; heads spread over ranks by tensor parallelism.

    logits "exact": m itself, without masked pairs and without queries that are padding, where the
    model calls ``scaled_dot_product_attention`` or writes the softmax out ("sdpa", "eager" of
    transformers); it is computed once more for that, in every forward pass in training. Not inside
    ``torch.compile``.

    logits "bound": ``scale * max |q| * max |k|`` in place of m, from the outputs of what makes
    queries and keys. Works with any attention kernel and under ``torch.compile``, and costs one
    read of queries and keys; usually 1 to 4 times m, so that it clips earlier, and it counts
    padding.

    Forward passes in evaluation mode or without gradients do not count. A skipped step changes
    nothing and what it saw is forgotten; a head with a logit that is not finite is left alone. In
    bf16 a factor nearer to 1 than half a unit in the last place is lost; as m is measured anew in
    every step nothing has to be made up for, and logits stay within 1.05 of the threshold.
    Weights must be what the optimizer updates: fp32 copies kept elsewhere (DeepSpeed, Megatron)
    would overwrite them.

    Metrics: ``max_logit`` of all heads before clipping, NaN if none was seen, infinite if one was
    not finite; ``clipped``, the share of heads above the threshold. Events: "clip" names the layers
    that are clipped for the first time in the run, "unseen" says in the first step that no
    attention was seen.

    Args:
        threshold: the largest logit, in nats, above 0.
        alpha: share of the queries, 0 to 1.
        logits: "exact" or "bound".
        query: names of the modules that make queries ("blocks.*.attn.wq"), in which ``*`` stands
            for one part.
        key: likewise of those that make keys, as many; the same where one makes both.
        layers: with "exact", names of the attention modules they belong to, as many. They must
            attend within one sequence.
        head_dim: length of a query; None takes all for one head.
        scale: with "bound", what products are multiplied by; None is ``head_dim ** -0.5``.
        fused: whether the outputs of the modules named are queries, keys and values, in this order.
        reduce: agree with all ranks, which costs one reduction. Must be False where ranks hold
            different layers (pipeline parallelism), and nowhere else.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or does not go with the others.
        AttachError: There is no model, or no attention that can be clipped.

    Example:
        >>> import stablekit
        >>> from torch import nn
        >>> model = nn.ModuleDict({"wq": nn.Linear(2, 2), "wk": nn.Linear(2, 2)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> clip = QKClip(0.5, logits="bound", query="wq", key="wk")
        >>> session = stablekit.attach(optimizer, clip, model=model)
        >>> x = torch.full((1, 1, 2), 9.0)
        >>> (model["wq"](x) @ model["wk"](x).mT).sum().backward()
        >>> optimizer.step()
        >>> session.metrics()["qk-clip/max_logit"] > 0.5
        True
        >>> float((model["wq"](x).norm() * model["wk"](x).norm()).detach() / 2**0.5)
        0.5000
    """

    cost = (
        "in every forward pass one read of queries and keys (bound) or all logits once more"
        " (exact); one reduction over ranks; a write of the weights of heads above the threshold"
    )
    needs = ("parameters", "model")

    def __init__(
        self,
        threshold: float = 100.0,
        *,
        alpha: float = 0.5,
        logits: str = "exact",
        query: str | None = None,
        key: str | None = None,
        layers: str | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        fused: bool = False,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.threshold = number("threshold", threshold, above=0)
        self.alpha = fraction("alpha", alpha, closed=True)
        self.logits = choice("logits", logits, ("exact", "bound"))
        self.query, self.key = modules.pattern("query", query), modules.pattern("key", key)
        self.layers = modules.pattern("layers", layers)
        self.head_dim = None if head_dim is None else whole("head_dim", head_dim, at_least=1)
        self.scale = None if scale is None else number("scale", scale, above=0)
        self.fused = flag("fused", fused)
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "qk-clip")
        self._check()
        self._sampling = Sampling(every=1)
        self._logits: BoundedLogits | ExactLogits | None = None
        self._held: Held | None = None
        self._told: dict[str, bool] = {}
        self._is_told = torch.zeros(0, dtype=torch.bool)
        self._took = False

    def _check(self) -> None:
        if (self.query is None) != (self.key is None):
            raise ValueError(f"name both, got query={self.query!r} and key={self.key!r}")
        extra = (self.head_dim, self.scale, self.layers, self.fused or None)
        if self.query is None and any(one is not None for one in extra):
            raise ValueError("layers, head_dim, scale and fused go with query= and key=")
        if self.query is not None and (self.layers is None) == (self.logits == "exact"):
            raise ValueError(
                "logits='exact' takes layers= as well as query= and key=, logits='bound' does not;"
                f" got logits={self.logits!r} and layers={self.layers!r}"
            )
        if self.logits == "exact" and self.scale is not None:
            raise ValueError("scale goes with logits='bound'; exact logits are seen with theirs")

    @classmethod
    def example(cls) -> QKClip:
        """Return one that takes any model's output for queries and for keys."""
        return cls(0.5, logits="bound", query="", key="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Find the layers and listen to them."""
        model = modules.model_of(session, self.name)
        by_attention = attention_of(
            model,
            self.query,
            self.key,
            self.layers,
            head_dim=self.head_dim,
            scale=self.scale,
            is_fused=self.fused,
        )
        layers = [*by_attention]
        names = modules.names_of_parameters(model)
        clipped = [clipped_layer(layer, names, alpha=self.alpha) for layer in layers]
        if self.logits == "bound":
            self._logits = BoundedLogits(model, layers, self._sampling, strict=True)
        else:
            refuse_compiled(session)
            watched = {layer.name: module for layer, module in by_attention.items()}
            heads = [layer.heads for layer in layers]
            self._logits = ExactLogits(model, watched, self._sampling, heads)
        self._held = Held(clipped, modules.device_of(model))
        self._recall()
        self._sampling.attach(session)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Clip the heads above the threshold."""
        if self._held is None:
            return
        factors = self._measure(step, self._held)
        acting = [True] * len(self._held.layers)
        if step.session.host:
            acting = (factors < 1).any(1).tolist()
        self._held.scale_(step, factors, acting)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Forget what a skipped step saw; tell what a dry run would have done."""
        if self._held is not None and step.session.dry_run:
            self._measure(step, self._held)
        elif self._logits is not None and not self._took:
            self._logits.drop()
        self._took = False

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._told = self._names_told()
        self._sampling.detach()
        self._logits, self._held = None, None

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the layers that were clipped so far."""
        return {"clipped": [name for name, told in self._names_told().items() if told]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: They are no names.
        """
        clipped = state["clipped"]
        if not isinstance(clipped, list) or not all(isinstance(name, str) for name in clipped):
            raise TypeError(f"clipped must be a list of names, got {clipped!r}")
        self._told = dict.fromkeys(clipped, True)
        self._recall()

    def _measure(self, step: Step, held: Held) -> Tensor:
        """Return factors ``[layers, heads]`` for the logits of this step, and record them."""
        assert self._logits is not None
        held.find(step)
        found, self._took = self._logits.take(reduce=self.reduce), True
        seen = found > -torch.inf
        factors = clip_factors(found, self.threshold)
        factors = torch.where(held.is_held[:, None] & step.ok.to(held.device), factors, 1.0)
        step.record("max_logit", largest(found, seen))
        clipped = factors < 1
        step.record("clipped", clipped.sum() / sum(layer.heads for layer in held.layers))
        what, compiles = "no attention layer saw a training batch", self.logits == "bound"
        self._sampling.complain(step, seen, what, compiles=compiles)
        self._tell(step, held, clipped.any(1), found)
        return factors

    def _tell(self, step: Step, held: Held, clipped: Tensor, found: Tensor) -> None:
        if step.session.host and not bool(clipped.any()):
            return
        news = clipped & ~self._is_told
        self._is_told = self._is_told | clipped
        step.emit(
            "clip",
            f"attention logits above {self.threshold:g}: clipped for the first time",
            when=news.any(),
            tensors=held.marked(news),
            max_logit=found.amax(),
        )

    def _recall(self) -> None:
        if self._held is not None:
            told = [self._told.get(layer.name, False) for layer in self._held.layers]
            self._is_told = torch.tensor(told, device=self._held.device)

    def _names_told(self) -> dict[str, bool]:
        if self._held is None:
            return self._told
        names = [layer.name for layer in self._held.layers]
        return dict(zip(names, self._is_told.tolist(), strict=True))
