"""What clipping does to the mean gradient: how often it acts, and where it turns the mean.

Koloskova, Hendrikx, Stich: Revisiting Gradient Clipping: Stochastic bias and tight convergence
guarantees (arXiv 2305.01588): clipped SGD follows the mean of the clipped gradients, which is not
along the mean gradient, whatever the learning rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import plugin_name, whole
from stablekit_monitors._gradient_sketch import sketch_of
from stablekit_monitors._sketch import WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["ClippingBias", "direction_and_length"]

_CHANGED = 1e-6


def direction_and_length(mean: Tensor, clipped_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine between two mean gradients, and the second's length in units of the first.

    Args:
        mean: mean of the gradients, ``[d]``.
        clipped_mean: mean of the clipped gradients, ``[d]``.

    Example:
        >>> direction_and_length(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        (tensor(0.7071), tensor(0.7071))
    """
    length, clipped_length = (torch.linalg.vector_norm(v) for v in (mean, clipped_mean))
    cosine = torch.dot(mean, clipped_mean) / (length * clipped_length)
    return cosine.clamp(-1.0, 1.0), clipped_length / length


@final
class ClippingBias:
    """Record how often clipping acts, and the mean of clipped gradients against that of raw ones.

    Means are exponential over about ``window`` sampled steps. They are not those of the gradients,
    which would need two copies of the parameters, but of a random projection of them to 4093
    numbers, the same in every step and every process; cosine and length of projected means estimate
    those of the means. The error is of the order of ``sqrt(1 - cosine ** 2) / 64`` for ``length``
    and ``(1 - cosine ** 2) / 64`` for ``cosine``: nothing where clipping does not turn the mean.

    The clipped gradient is the one the optimizer saw, after every plugin and whatever it did. (In a
    dry run: what it would have seen from plugins that multiply whole tensors.)

    Metrics:

    * ``fraction``: share of steps in which a gradient was changed, 0 to 1. Healthy: a few percent
      where clipping is against outliers; at 1 it is normalised gradient descent.
    * ``cosine``: between the mean of the clipped gradients and that of the raw ones, -1 to 1.
      Healthy: above 0.95. Low values say that outliers which clipping removes carry part of the
      direction (they may be the signal, or broken batches), or that factors differ much between
      tensors.
    * ``length``: length of the mean of the clipped gradients over that of the raw ones. What is
      below 1 is learning rate lost to clipping.

    The mean of few gradients is mostly noise; over a window of 100 steps the numbers say what
    happened to these 100, and are not yet expectations. Skipped steps, gradients that are not
    finite, and steps that evaluate a closure more than once do not count.

    Args:
        window: over about how many sampled steps means are taken, at least 1.
        every: sample the steps whose number this divides, at least 1.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> session = stablekit.attach(optimizer, "global-norm", ClippingBias(every=1))
        >>> for gradient in ([1.0, 0.0], [0.0, 9.0]):
        ...     p.grad = torch.tensor(gradient)
        ...     optimizer.step()
        >>> session.metrics()["clipping-bias/fraction"]
        0.5025
    """

    needs = ("elements",)
    cost = (
        "in sampled steps one read of the gradients, a second one if they were changed, and a"
        " reduction for each where they are sharded; 33 kB of state"
    )

    def __init__(self, window: int = 100, *, every: int = 10, name: str | None = None) -> None:
        """Check the arguments and start without a mean."""
        self.window = whole("window", window, at_least=1)
        self.every = whole("every", every, at_least=1)
        self.name = plugin_name(name, "clipping-bias")
        self._means = torch.zeros(2 * WIDTH + 2)
        self._raw: Tensor | None = None

    @classmethod
    def example(cls) -> ClippingBias:
        """Return one that looks in every step."""
        return cls(window=5, every=1)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Project the raw gradients of a sampled step."""
        self._raw = None
        if step.number % self.every == 0 and step.parameters:
            self._raw = sketch_of(step) * _unscale(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Take raw and clipped gradients into the means."""
        raw, self._raw = self._raw, None
        if raw is None or step.evaluation > 0:
            return
        when = step.flag(step.learning & step.gradients.raw_norm().isfinite())
        if when is not False:
            self._learn(step, raw, torch.as_tensor(when))
        changed, weight = self._means[-2:].unbind()
        cosine, length = direction_and_length(self._means[:WIDTH], self._means[WIDTH:-2])
        step.record("fraction", changed / weight)
        step.record("cosine", cosine)
        step.record("length", length)

    def state_dict(self) -> dict[str, Any]:
        """Return the means: of raw and clipped projections, of changed steps, of ones."""
        return {"means": self._means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: The means are not a tensor of floating point numbers.
            ValueError: They are of another length, or not finite.
        """
        means = state["means"]
        if not isinstance(means, Tensor) or not means.is_floating_point():
            raise TypeError(f"means must be a tensor of numbers, got {means!r}")
        if means.shape != self._means.shape or not bool(means.isfinite().all()):
            raise ValueError(
                f"means must be {self._means.numel()} finite numbers, got {list(means.shape)}"
            )
        self._means = means.detach().float()

    def _learn(self, step: Step, raw: Tensor, when: Tensor) -> None:
        norms, before = step.gradients.norms(), step.gradients.raw_norms()
        changed = ((norms - before).abs() > _CHANGED * before).any()
        seen = _clipped(step, raw, norms, before) if step.flag(changed) is not False else raw
        sample = torch.cat([raw, seen, torch.stack([changed.float(), torch.ones_like(raw[0])])])
        means = self._means.to(sample.device)
        beta = 1.0 - 1.0 / self.window
        self._means = torch.where(when, beta * means + (1.0 - beta) * sample, means)


def _clipped(step: Step, raw: Tensor, norms: Tensor, before: Tensor) -> Tensor:
    """Return the sketch of what the optimizer saw; in a dry run, would have seen."""
    if not step.session.dry_run:
        return sketch_of(step)
    return sketch_of(step, torch.where(before > 0, norms / before, 1.0))


def _unscale(step: Step) -> Tensor | float:
    """Return what makes gradients in memory true, where a GradScaler leaves that to the kernel."""
    scale: Tensor | None = getattr(step.session.optimizers[0], "grad_scale", None)
    return 1.0 if scale is None else scale.float().reciprocal().to(step.gradients.device)
