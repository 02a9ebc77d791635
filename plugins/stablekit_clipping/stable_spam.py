"""Keeping every tensor's gradient on a steady scale, and resetting the momentum now and then.

Huang et al.: Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam (arXiv 2502.17055).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import fraction, number, plugin_name, whole
from stablekit.moments import Resets
from stablekit.statistics import NamedValues
from stablekit_clipping._loan import Loan, require_betas
from stablekit_clipping._peaks import lower_peaks_
from stablekit_clipping._report import report_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step

__all__ = ["StableSPAM", "adaclip_limit", "adagn_norm", "cosine_scale"]


def cosine_scale(update: int, *, total_steps: int | None, eta_min: float) -> float:
    """Return the factor on beta1 at an update, counted from 1: ``1`` falling to ``eta_min``.

    ``eta_min + (1 - eta_min) * (1 + cos(pi * update / (total_steps + 1))) / 2``; 1 without
    ``total_steps``.

    Example:
        >>> [round(cosine_scale(t, total_steps=100, eta_min=0.5), 4) for t in (1, 50, 100)]
        [0.9999, 0.7539, 0.5001]
    """
    if total_steps is None:
        return 1.0
    return eta_min + (1 - eta_min) * (1 + math.cos(math.pi * update / (total_steps + 1))) / 2


def adaclip_limit(average: Tensor, counts: Tensor, *, gamma3: float) -> Tensor:
    """Return the largest element a gradient may have: the debiased average of largest elements.

    Args:
        average: running averages of each tensor's largest absolute element, ``[P]``.
        counts: how many values they were made from, ``[P]``, at least 1.
        gamma3: weight of the past.

    Example:
        >>> adaclip_limit(torch.tensor([0.5]), torch.tensor([1.0]), gamma3=0.5)
        tensor([1.])
    """
    return average / _debias(gamma3, counts)


def adagn_norm(
    mean: Tensor,
    square: Tensor,
    counts: Tensor,
    *,
    gamma1: float,
    gamma2: float,
    eps: float | Tensor,
) -> Tensor:
    """Return the norm a gradient is given: ``mean / (sqrt(square) + eps)``, both debiased.

    About 1 for any tensor whose norm is steady, smaller after a norm that was large.

    Args:
        mean: running averages of norms, ``[P]``.
        square: running averages of squared norms, ``[P]``.
        counts: how many values they were made from, ``[P]``, at least 1.
        gamma1: weight of the past in ``mean``.
        gamma2: weight of the past in ``square``.
        eps: added to the denominator.

    Example:
        >>> one = torch.ones(1)
        >>> adagn_norm(3 * one / 2, 9 * one / 4, one, gamma1=0.5, gamma2=0.75, eps=0.0)
        tensor([1.])
    """
    root = (square / _debias(gamma2, counts)).sqrt()
    return mean / _debias(gamma1, counts) / (root + eps)


def _debias(gamma: float, counts: Tensor) -> Tensor:
    """Return ``1 - gamma ** counts`` without losing digits where gamma is near 1."""
    if gamma == 0.0:
        return torch.ones_like(counts)
    return -torch.expm1(counts * math.log(gamma))


@final
class StableSPAM:
    """Lower outliers in every gradient, then give every tensor a norm of about 1.

    Of each tensor, with ``a`` its largest absolute element and ``N`` its norm after the first line:

    * AdaClip: ``M = gamma3 * M + (1 - gamma3) * a``; elements above ``T = M / (1 - gamma3**k)`` are
      multiplied by ``T / a``, so that the largest becomes ``T`` and others land below it;
    * AdaGN: ``mu = gamma1 * mu + (1 - gamma1) * N``, ``nu = gamma2 * nu + (1 - gamma2) * N**2``;
      the gradient gets the norm ``mu / (1 - gamma1**k) / (sqrt(nu / (1 - gamma2**k)) + eps)``;
    * MoRet: every ``reset_interval`` updates the optimizer's moments are set to zero;
    * with ``total_steps``, beta1 and gamma1 are multiplied by a cosine from 1 to ``eta_min``.

    On ``torch.optim.AdamW`` the parameters follow the authors' optimizer, their reset included:
    that update is made with the old moments under the bias corrections of a first step, its
    gradient is lost to the new ones, and ``k`` starts again at 1 while M, mu and nu stay, so that
    AdaClip hardly clips for some hundred updates. After ``total_steps + 1`` updates the cosine
    rises again. What is ours: a tensor whose gradient is not finite teaches nothing (there it is
    NaN for the rest of the run), counters and cosine are in the checkpoint, sharded tensors work.

    The scale of gradients is lost: a threshold on norms after it means nothing, and a gradient
    that goes to zero is blown up to norm 1 all the same. The optimizer needs moments to reset: SGD
    with momentum, Lion and Muon lose their first moment only; without any, give
    ``reset_interval=0``. In device mode the cosine and the resets may be late by as many updates
    as there were skips since metrics were last read.

    Args:
        gamma1: weight of the past in the mean of norms; -1 for the optimizer's beta1.
        gamma2: weight of the past in the mean of squared norms.
        gamma3: weight of the past in the mean of largest elements.
        total_steps: length of the cosine in updates; None for none.
        eta_min: where the cosine ends, from 0 to 1.
        reset_interval: updates between two resets; 0 for none. The authors use 500 in 4 bits.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
        AttachError: The optimizer has nothing to reset, or no beta1 to multiply.

    Example:
        >>> import torch, stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stablekit.wrap(torch.optim.AdamW([p], lr=0.1), StableSPAM())
        >>> p.grad = torch.tensor([30.0, 40.0])
        >>> optimizer.step()
        >>> p.grad
        tensor([0.6000, 0.8000])
    """

    cost = (
        "two reads and a write of the gradients, one more read and write of tensors with outliers;"
        " three reductions where sharded"
    )
    needs = ("amaxes", "elements", "parameters")

    def __init__(
        self,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        *,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        reset_interval: int = 1000,
        name: str | None = None,
    ) -> None:
        """Check the arguments and start without statistics."""
        self.gamma1 = -1.0 if gamma1 == -1 else fraction("gamma1", gamma1)
        self.gamma2 = fraction("gamma2", gamma2)
        self.gamma3 = fraction("gamma3", gamma3)
        self.total_steps = (
            None if total_steps is None else whole("total_steps", total_steps, at_least=1)
        )
        self.eta_min = fraction("eta_min", eta_min, closed=True)
        self.reset_interval = whole("reset_interval", reset_interval)
        self.name = plugin_name(name, "stable-spam")
        self._rows = NamedValues(default=0.0, shape=(4,))
        self._resets = Resets(self.reset_interval, self.name)
        self._loan = Loan()
        self._used: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    @classmethod
    def example(cls) -> StableSPAM:
        """Return an instance that resets within a short run."""
        return cls(reset_interval=10)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Refuse an optimizer without beta1 where it is to be scaled."""
        if self.total_steps is not None or self.gamma1 == -1:
            require_betas(session, self.name)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Give back what an optimizer that raised could not."""
        self._loan.restore()

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Lower outliers, then scale each tensor."""
        gradients = step.gradients
        peaks = gradients.amaxes()
        rows = self._rows.align(gradients.names, peaks.device)
        knows, average, mean, square = rows.unbind(1)
        counts = knows + 1
        if step.evaluation == 0:
            average = self.gamma3 * average + (1 - self.gamma3) * peaks
            self._used = adaclip_limit(average, counts, gamma3=self.gamma3), peaks
        limits = torch.where(peaks.isfinite(), self._used[0], torch.inf)
        clipped = lower_peaks_(step, peaks, limits)
        norms = gradients.norms()
        if step.evaluation == 0:
            mean, square, wanted = self._stabilised(step, norms, mean, square, counts)
            self._used = self._used[0], wanted
            told = gradients.present & step.learning & norms.isfinite() & peaks.isfinite()
            new = torch.stack([counts, average, mean, square], 1)
            self._rows.set(torch.where(told[:, None], new, rows))
        factors = torch.where(norms > 0, self._used[1] / norms, 1.0)
        gradients.scale_(torch.where(norms == math.inf, 0.0, factors))
        self._report(step, factors, clipped, limits)

    @hookimpl
    def before_update(self, step: Step) -> None:
        """Scale beta1 for this update; at a reset let bias corrections start anew."""
        self._loan.scale_beta1(step, self._scale(step))
        if self._resets.is_due(step):
            self._resets.rewind(step)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Give beta1 back; at a reset clear the moments and the counts."""
        self._loan.restore()
        self._resets.check(step)
        if self._resets.is_due(step):
            self._resets.clear(step)
            rows = self._rows.align(step.gradients.names, step.gradients.device)
            started = rows.index_fill(1, torch.zeros(1, dtype=torch.long, device=rows.device), 1.0)
            known = (rows[:, :1] > 0) & step.ok
            self._rows.set(torch.where(known, started, rows))

    @hookimpl
    def on_skip(self, step: Step) -> None:
        """Repeat a reset that was due in a step which turned out to be skipped."""
        self._resets.missed(step)

    @hookimpl
    def on_detach(self) -> None:
        """Leave the groups as they were."""
        self._loan.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics by parameter name, and the update of the latest reset."""
        names = self._rows.rows()
        return {
            "reset_at": self._resets.last,
            "rows": {n: row.tolist() for n, row in names.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved statistics.

        Raises:
            TypeError: A field is of the wrong type.
            ValueError: A number is not finite, or is negative.
        """
        reset_at = whole("reset_at", state["reset_at"])
        rows = {name: _row(name, values) for name, values in dict(state["rows"]).items()}
        self._rows.replace(rows)
        self._resets.last = reset_at

    def _scale(self, step: Step) -> float:
        return cosine_scale(step.updates + 1, total_steps=self.total_steps, eta_min=self.eta_min)

    def _stabilised(
        self, step: Step, norms: Tensor, mean: Tensor, square: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the averages with this step's norms in them, and the norms to give."""
        gamma1 = self.gamma1 if self.gamma1 != -1 else float(step.groups[0]["betas"][0])
        gamma1 *= self._scale(step)
        mean = gamma1 * mean + (1 - gamma1) * norms
        square = self.gamma2 * square + (1 - self.gamma2) * norms.square()
        eps = [eps if isinstance(eps := g.get("eps"), float) else 1e-8 for g in step.groups]
        added = norms.new_tensor(eps) if len(set(eps)) > 1 else max(eps, default=0.0)
        wanted = adagn_norm(mean, square, counts, gamma1=gamma1, gamma2=self.gamma2, eps=added)
        return mean, square, wanted

    def _report(self, step: Step, factors: Tensor, clipped: Tensor, limits: Tensor) -> None:
        report_factors(step, factors)
        step.record("clipped", clipped.float().mean() if clipped.numel() else 0.0)
        if limits.numel():
            step.record("threshold", torch.where(limits.isinf(), 0.0, limits).max())


def _row(name: str, values: Any) -> Tensor:  # noqa: ANN401 - from a checkpoint
    fields = ("count", "largest", "norm", "square")
    if not isinstance(values, (list, tuple)) or len(values) != len(fields):
        raise TypeError(f"rows[{name!r}] must be {len(fields)} numbers, got {values!r}")
    checked = [
        number(f"rows[{name!r}].{field}", value, at_least=0)
        for field, value in zip(fields, values, strict=True)
    ]
    return torch.tensor(checked, dtype=torch.float32)
