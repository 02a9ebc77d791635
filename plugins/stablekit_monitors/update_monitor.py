"""How far an update moves the weights, and how stale the second moments are that scale it.

Wortsman et al.: Stable and low-precision training for large-scale vision-language models (arXiv
2304.13013): RMS_t above 1 comes some steps before a loss spike. The rule of thumb for the ratio of
update to weight, 1e-3, is Karpathy's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import flag, number, plugin_name, whole
from stablekit.moments import second
from stablekit_monitors._update_norms import UpdateNorms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablekit import Step

__all__ = ["UpdateMonitor", "squared_staleness", "update_ratios"]

_NAMED = 5
_SMALLEST = 1e-12
_AT_ONCE = {"cpu": 1 << 18}
"""What fits into a cache; elsewhere few calls matter more."""


def update_ratios(updates: Tensor, weights: Tensor) -> Tensor:
    """Return ``|dp| / |p|`` of each tensor, 0 where the weight was 0.

    Args:
        updates: L2 norms of what was added, ``[P]``.
        weights: L2 norms of the weights before.

    Example:
        >>> update_ratios(torch.tensor([0.1, 2.0]), torch.tensor([10.0, 0.0]))
        tensor([0.0100, 0.0000])
    """
    return torch.where(weights > 0, updates / weights, 0.0)


def squared_staleness(
    gradient: Tensor, second_moment: Tensor, *, correction: Tensor | float = 1.0, eps: float = 1e-8
) -> Tensor:
    """Return ``sum(g ** 2 / max(v / correction, eps ** 2))``; its mean is ``RMS_t ** 2``.

    Args:
        gradient: what the optimizer saw.
        second_moment: its running mean of squares, this gradient included.
        correction: ``1 - beta2 ** t``, by which Adam divides.
        eps: the optimizer's.

    Example:
        >>> squared_staleness(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(5.)
    """
    size = _AT_ONCE.get(gradient.device.type, 1 << 24)
    pairs = zip(*(x.reshape(-1).split(size) for x in (gradient, second_moment)), strict=True)
    parts = [
        g.float().square().div_((v.float() / correction).clamp_(min=eps**2)).sum() for g, v in pairs
    ]
    return torch.stack(parts).sum()


@final
class UpdateMonitor:
    """Record the ratio of update to weight, and Adam's RMS_t, in one step of so many.

    The update is what the whole step moved a tensor by: the optimizer's, weight decay and
    projections of other plugins included. It is measured from a copy of the parameters, which is
    kept from before the step until after it; with ``only(...)`` of the chosen ones alone.

    Metrics, without unit:

    * ``ratio``: ``|dp| / |p|`` over all tensors together, and ``ratio_log10``, its logarithm, at
      least -12. Healthy: about -3; -4 and below learns slowly, -2 and above is close to diverging
      (unless weights start near 0).
    * ``ratio_largest``: the largest of a tensor with two dims or more; vectors often start at 0.
    * ``rms``: ``RMS_t = sqrt(mean(g ** 2 / max(v, eps ** 2)))`` over all elements with a second
      moment (``exp_avg_sq`` and others, see :mod:`stablekit.moments`), with the gradient and the
      debiased moment that the optimizer used. Healthy: about 1 or below. Well above 1 (the paper
      takes 2.3) the moments are out of date for this gradient, and the update is too large.
    * ``rms_largest``: the largest of one tensor.
    * with ``per_tensor``: ``ratio/<name>`` and ``rms/<name>``.

    In a skipped step nothing is recorded; in device mode NaN is. Where no tensor has a second
    moment there is no ``rms``; a tensor without gradient in the step, or with one that is sparse,
    counts as 0.

    Events, in a sampled step, with up to 5 names in ``tensors``, the worst first:

    * "large-update": a tensor of two dims or more is above ``ratio_alarm``; ``ratio``.
    * "stale-moments": a tensor is above ``rms_alarm``; ``rms``.

    Args:
        every: sample the steps whose number this divides, at least 1.
        per_tensor: record every tensor's own values too.
        ratio_alarm: above which ratio to emit an event, or None.
        rms_alarm: above which RMS_t to emit an event, or None.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> p = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> session = stablekit.attach(optimizer, UpdateMonitor(every=1))
        >>> p.grad = torch.ones(2, 2)
        >>> optimizer.step()
        >>> session.metrics()["update-monitor/ratio"]
        0.05
    """

    needs = ("parameters",)
    cost = (
        "in sampled steps a copy of the parameters, some reads of them and of the second moments,"
        " and three reductions where they are sharded"
    )

    def __init__(
        self,
        every: int = 100,
        *,
        per_tensor: bool = False,
        ratio_alarm: float | None = None,
        rms_alarm: float | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.per_tensor = flag("per_tensor", per_tensor)
        self.ratio_alarm = _alarm("ratio_alarm", ratio_alarm)
        self.rms_alarm = _alarm("rms_alarm", rms_alarm)
        self.name = plugin_name(name, "update-monitor")
        self._copies = UpdateNorms()
        self._weights: Tensor | None = None

    @classmethod
    def example(cls) -> UpdateMonitor:
        """Return one that looks in every step and has something to say."""
        return cls(every=1, per_tensor=True, ratio_alarm=0.01, rms_alarm=1.5)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Copy the parameters in a sampled step."""
        self._weights = None
        if step.number % self.every == 0 and step.parameters:
            self._weights = step.norms_of(step.parameters)
            self._copies.begin(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Measure what the step did."""
        weights, self._weights = self._weights, None
        updates = self._copies.end(step)
        if weights is None or updates is None or step.flag(step.ok) is False:
            return
        self._tell_ratios(step, updates, weights)
        self._tell_rms(step)

    def _tell_ratios(self, step: Step, updates: Tensor, weights: Tensor) -> None:
        total = torch.linalg.vector_norm(updates) / torch.linalg.vector_norm(weights)
        ratios = update_ratios(updates, weights)
        _record(step, "ratio", total)
        _record(step, "ratio_log10", total.clamp(min=_SMALLEST).log10())
        self._record_each(step, "ratio", ratios, range(len(ratios)))
        places = [i for i, param in enumerate(step.parameters) if param.ndim > 1]
        if places:
            _record(step, "ratio_largest", ratios[places].amax())
            message = "an update is large for its weights"
            _alert(step, "large-update", message, places, ratios[places], self.ratio_alarm, "ratio")

    def _tell_rms(self, step: Step) -> None:
        places = [i for i, state in enumerate(step.states) if second(state) is not None]
        if not places:
            return
        sums = step.norms_of(_staleness(step))[places].square()
        present = step.gradients.present[places]
        sizes = torch.tensor([step.parameters[i].numel() for i in places], device=sums.device)
        rms = torch.where(present, (sums / sizes).sqrt(), 0.0)
        _record(step, "rms", (sums.sum() / (sizes * present).sum()).sqrt())
        _record(step, "rms_largest", rms.amax())
        self._record_each(step, "rms", rms, places)
        message = "second moments are out of date for this gradient"
        _alert(step, "stale-moments", message, places, rms, self.rms_alarm, "rms")

    def _record_each(self, step: Step, metric: str, values: Tensor, places: Sequence[int]) -> None:
        if self.per_tensor:
            for i, value in zip(places, values.unbind(), strict=True):
                _record(step, f"{metric}/{step.gradients.names[i]}", value)


def _alarm(argument: str, value: float | None) -> float | None:
    return None if value is None else number(argument, value, above=0)


def _record(step: Step, name: str, value: Tensor) -> None:
    step.record(name, torch.where(step.ok, value, math.nan))


def _alert(
    step: Step,
    kind: str,
    message: str,
    places: Sequence[int],
    values: Tensor,
    limit: float | None,
    what: str,
) -> None:
    """Emit an event that names the tensors above a limit, the worst first."""
    if limit is None:
        return
    worst, order = values.topk(min(_NAMED, len(places)))
    named = torch.tensor(places, device=values.device)[order]
    named = torch.where(worst > limit, named, -1)
    is_bad = step.ok & (worst[0] > limit)
    message = f"{message}: {what} above {limit:.4g}"
    if step.session.host and bool(is_bad):
        message = f"{message}, {worst[0].item():.4g} in {step.gradients.names[int(named[0])]}"
    step.emit(kind, message, when=is_bad, tensors=named, **{what: worst[0]})


def _staleness(step: Step) -> list[Tensor | None]:
    """Return for each tensor the root of the sum over what this rank holds, None without one."""
    found: list[Tensor | None] = []
    for param, state, group in zip(step.parameters, step.states, step.groups, strict=True):
        v, grad = second(state), param.grad
        here = None if grad is None else getattr(grad.detach(), "to_local", grad.detach)()
        if v is None or here is None or here.is_sparse or v.shape != here.shape:
            found.append(None)
            continue
        eps = float(group.get("eps", 1e-8))
        correction = _correction(state, group)
        total = squared_staleness(here, v, correction=correction, eps=eps)
        found.append(total.sqrt().view(1))
    return found


def _correction(state: dict[str, Any], group: dict[str, Any]) -> Tensor | float:
    """Return what the optimizer divides its second moment by: 1 where it has no betas."""
    if "betas" not in group or "step" not in state:
        return 1.0
    count = state["step"]
    correction: Tensor | float = 1.0 - group["betas"][1] ** (
        count.double() if isinstance(count, Tensor) else count
    )
    return correction
