"""How large the output logits are: their log-partition function and their largest element.

The quantity that z-loss holds down: Chowdhery et al.: PaLM (arXiv 2204.02311), section 5; Wortsman
et al.: Small-scale proxies for large-scale Transformer training instabilities (arXiv 2309.14322)
watch it diverge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import flag, plugin_name, whole
from stablekit.forward import Sampling, Slots, modules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step

__all__ = ["LogitsMonitor", "logit_sizes"]

_AT_ONCE = 1 << 24


def logit_sizes(logits: Tensor) -> Tensor:
    """Return the sum of ``logsumexp`` over rows, how many rows, its largest, and the largest |x|.

    Args:
        logits: ``[..., vocabulary]``; taken in parts, since a float32 copy of all may be large.

    Returns:
        Float32 ``[4]``.

    Example:
        >>> logit_sizes(torch.tensor([[0.0, 0.0], [-3.0, -3.0]])).tolist()
        [-1.61370, 2.0, 0.69314, 3.0]
    """
    rows = logits.flatten(0, -2)
    parts = rows.split(max(1, _AT_ONCE // rows.shape[1]))
    sums, highest, peaks = torch.stack([_sizes_of(part.float()) for part in parts]).unbind(1)
    count = torch.full_like(sums[0], rows.shape[0])
    return torch.stack([sums.sum(), count, highest.amax(), peaks.amax()])


def _sizes_of(rows: Tensor) -> Tensor:
    found = rows.logsumexp(1)
    return torch.stack([found.sum(), found.amax(), rows.abs().amax()])


@final
class LogitsMonitor:
    """Record logsumexp and the largest magnitude of the output logits, in one step of so many.

    Over all positions of all micro-batches of the step and all ranks, padding and ignored labels
    included. Forward passes in evaluation mode or without gradients are not looked at.

    Metrics, in nats:

    * ``logsumexp``: mean of ``log(sum(exp(logits)))``. The loss does not see it, so it drifts;
      healthy is a slow drift within some tens of 0, where a z-loss holds it near 0. Hundreds, or a
      steady run away from 0, cost precision in bf16 and come before divergence.
    * ``logsumexp_largest``: the largest one.
    * ``largest``: the largest absolute logit. Healthy: tens; in bf16 neighbouring numbers at 256
      are 2 apart.

    NaN: no training batch was seen, or no logits in it. Infinite, the mean infinite or NaN: a logit
    was not finite.

    Event "unseen": there were none in the first sampled step, as with fused losses (Liger) that
    never compute logits in training.

    Args:
        every: sample the steps whose number this divides, at least 1.
        module: name of the module whose output are the logits ("lm_head"). None takes ``.logits``
            of the model's output, or the output itself if it is a tensor.
        reduce: agree with all ranks, which costs two reductions in a sampled step. Must be False
            where only some ranks have logits (pipeline parallelism).
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> model = torch.nn.Linear(2, 4, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> session = stablekit.attach(optimizer, LogitsMonitor(every=1), model=model)
        >>> model(torch.zeros(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> session.metrics()["logits-monitor/logsumexp"]  # log(4)
        1.38629
    """

    needs = ("model",)
    cost = (
        "in sampled steps one read of the logits, 64 MB at a time in float32, and two reductions"
        " over ranks; otherwise one flag"
    )

    def __init__(
        self,
        every: int = 100,
        *,
        module: str | None = None,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.module = modules.pattern("module", module)
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "logits-monitor")
        self._sampling = Sampling(self.every)
        self._slots: Slots | None = None

    @classmethod
    def example(cls) -> LogitsMonitor:
        """Return one that looks in every step."""
        return cls(every=1)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Listen to the model, or to the module named."""
        model = modules.model_of(session, self.name)
        found = {"": model}
        if self.module is not None:
            found = modules.matching(model, self.module, argument="module")
        self._slots = Slots(self._sampling, 1, sums=2, peaks=2, device=modules.device_of(model))
        for one in found.values():
            self._slots.watch(0, one, _look)
        self._sampling.attach(session)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what a sampled step saw."""
        if self._sampling.is_armed and self._slots is not None:
            total, count, highest, peak = self._slots.take(reduce=self.reduce)[0].unbind()
            seen = count > 0
            step.record("logsumexp", total / count)
            step.record("logsumexp_largest", torch.where(seen, highest, torch.nan))
            step.record("largest", torch.where(seen, peak, torch.nan))
            self._sampling.complain(step, seen, "no logits were seen")
        self._sampling.arm(step.number)

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._sampling.detach()
        self._slots = None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is sampled."""
        return self._sampling.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: A field is not a bool.
        """
        self._sampling.load_state_dict(state)


def _look(output: Any) -> Tensor | None:  # noqa: ANN401 - any module's output
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.numel():
        return None
    return logit_sizes(modules.whole(logits)) if logits.ndim > 1 else None
