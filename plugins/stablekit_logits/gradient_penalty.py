"""Gradient penalty: a critic whose slope between real and generated samples is near 1.

Gulrajani et al.: Improved Training of Wasserstein GANs (arXiv 1704.00028), equation 3; the
one-sided form is from Petzka et al.: On the regularization of Wasserstein GANs (arXiv 1709.08894).
The authors' code (igul222/improved_wgan_training) has no constant under the root, so that a slope
of 0 gives NaN; here it is 1e-12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit import hookimpl
from stablekit.arguments import choice, flag, number, plugin_name, whole
from stablekit.errors import AttachError
from stablekit.forward import Sampling, modules
from stablekit_logits._criteria import GradientPenaltyLoss
from stablekit_logits._doors_on import refuse_second
from stablekit_logits._heads import module_name
from stablekit_logits._joined import joined
from stablekit_logits._slopes import gradient_penalty, interpolate, slope_penalty, slopes
from stablekit_logits._tally import Tally
from stablekit_logits._use import Use

if TYPE_CHECKING:
    from stablekit import Session, Step

__all__ = [
    "GradientPenalty",
    "GradientPenaltyLoss",
    "gradient_penalty",
    "interpolate",
    "slope_penalty",
    "slopes",
]

_BATCHES = ("calls", "halves")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PRIME = 1_000_003
_WHY = (
    "it takes pairs of D(real) and D(fake.detach()) with samples that need no gradient; is the"
    " critic that was attached the one that is trained?"
)


@final
class GradientPenalty:
    """Add ``weight * mean((||grad D(x)|| - 1) ** 2)`` to the loss of the critic it is attached to.

    For a session of the critic's optimizer alone, which steps at other times than the generator's.
    Between two steps the critic is to be called in pairs, once with real and once with generated
    samples of the same shape, neither of which requires a gradient: ``D(real)`` and
    ``D(fake.detach())``. Calls with samples that do require one are the generator's turn and left
    alone.

    The penalty joins the graph at the second output of a pair: its gradient flows when that of the
    output does, multiplied by what the loss was multiplied by (``1 / accumulation_steps``, the
    scale of a GradScaler). That factor can be read off the gradient only where the critic's loss is
    ``D(fake).mean() - D(real).mean()``; another loss needs ``loss_factor``. What a training loop
    prints as its loss is without the penalty. Where you write the loss, :func:`gradient_penalty` is
    plainer.

    Not for critics with batch norm, under ``torch.compile`` (no double backward) or with sharded
    parameters; they are refused. The points between are drawn anew in every step from its number,
    so that random numbers of the training are not used up and a resumed run is the same.

    Metrics: ``penalty``, without the weight; ``slope``, the mean slope, near 1 if all is well.

    Args:
        weight: of the penalty, at least 0.
        one_sided: let slopes below 1 be.
        on: name of the critic; None is the model of the session.
        batches: "calls": two calls are a pair; "halves": every call holds both batches, one half
            each, in either order, as in ``D(torch.cat([real, fake]))``.
        loss_factor: what the loss is multiplied by before ``backward``, for a critic with another
            loss; 1 without gradient accumulation and without a GradScaler. None reads it off.
        seed: of the points between.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range; or, in use, the batches are no pair.
        AttachError: The critic is compiled or sharded or has batch norm, or this plugin acts on
            it for another session; or, in use, it was not called in pairs, or has another loss.

    Example:
        >>> import stablekit
        >>> critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(critic.parameters())
        >>> session = stablekit.attach(optimizer, GradientPenalty(10.0), model=critic)
        >>> real, fake = torch.randn(4, 2), torch.randn(4, 2)
        >>> (critic(fake).mean() - critic(real).mean()).backward()
        >>> optimizer.step()
        >>> session.metrics()["gradient-penalty/penalty"] > 0
        True
    """

    needs = ("model", "loss")
    cost = "a forward and two backward passes of the critic, and one reduction over ranks"

    def __init__(
        self,
        weight: float = 10.0,
        *,
        one_sided: bool = False,
        on: str | int | None = None,
        batches: str = "calls",
        loss_factor: float | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.weight = number("weight", weight, at_least=0)
        self.one_sided = flag("one_sided", one_sided)
        self.on = module_name(on)
        self.batches = choice("batches", batches, _BATCHES)
        self.loss_factor = loss_factor
        if loss_factor is not None:
            self.loss_factor = number("loss_factor", loss_factor, above=0)
        self.seed = whole("seed", seed)
        self.name = plugin_name(name, "gradient-penalty")
        self._tally = Tally("penalty", "slope")
        self._sampling = Sampling(every=1)
        self._use = Use(self.name)
        self._critic: nn.Module | None = None
        self._handle: Any = None
        self._first: Tensor | None = None
        self._pairs = 0
        self._is_other: Tensor | None = None

    @classmethod
    def example(cls) -> GradientPenalty:
        """Return an instance for a model that is called once a step."""
        return cls(1.0, batches="halves", loss_factor=1.0)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Listen to the critic.

        Raises:
            AttachError: It is none that can be taken.
        """
        critic = _critic(modules.model_of(session, self.name), self.on, self.name)
        refuse_second(session, self.name)
        self._critic, self._pairs, self._first = critic, 0, None
        self._use.start()
        self._is_other = torch.zeros((), dtype=torch.bool, device=modules.device_of(critic))
        self._handle = critic.register_forward_hook(_Hook(self))
        self._sampling.attach(session)
        self._tally.open(session, modules.device_of(critic))

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Raise where there were no pairs, or no loss the penalty could be weighed against."""
        assert self._critic is not None
        if self._first is not None:
            self._first = None
            raise AttachError(
                f"{self.name} saw an odd number of calls of the critic with samples that need no"
                " gradient since the last step; it takes pairs of D(real) and D(fake.detach())."
                " Where one call holds both, D(torch.cat([real, fake])), give batches='halves'"
            )
        self._use.check(step, self._critic, "the critic", lambda: _WHY)
        assert self._is_other is not None
        is_other, self._is_other = self._is_other, torch.zeros_like(self._is_other)
        what = (
            f"{self.name} adds its penalty to the loss D(fake).mean() - D(real).mean(), and the"
            " critic has another one; give loss_factor=, what it is multiplied by before backward"
            " (1 without gradient accumulation and without a GradScaler)"
        )
        if step.session.host and bool(is_other):
            raise AttachError(what)
        step.emit("other-loss", what, when=is_other)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record penalty and slope."""
        self._tally.record(step)
        self._pairs = 0

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Leave the critic as it was."""
        if self._sampling.session is not session:
            return
        self._handle.remove()
        self._sampling.detach()
        self._tally.close()
        self._handle = self._critic = self._first = self._is_other = None

    @property
    def session(self) -> Session | None:
        """The session it acts for."""
        return self._sampling.session

    def after_forward(self, critic: nn.Module, samples: Tensor, output: Tensor) -> Tensor:
        """Return a critic's output; that of a pair is joined by the penalty."""
        if samples.requires_grad or not output.requires_grad:
            return output
        if not self._use.looks(self._sampling, critic):
            return output
        real, fake = self._pair(samples)
        if not self.weight:
            return output
        if real is None:
            return self._join(output, torch.zeros((), device=output.device))
        slope = slopes(critic.forward, interpolate(real, fake, generator=self._points(real.device)))
        penalty = slope_penalty(slope, one_sided=self.one_sided)
        one = torch.ones_like(penalty)
        self._tally.add(one, penalty, slope.mean())
        return self._join(output, self.weight * penalty)

    def _join(self, output: Tensor, term: Tensor) -> Tensor:
        assert self._sampling.session is not None
        if self._sampling.session.dry_run:
            return output
        rows = len(output) // 2 if self.batches == "halves" else len(output)
        return joined(output, term, rows, self.loss_factor, self._is_other)

    def _pair(self, samples: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.batches == "halves":
            if len(samples) % 2:
                raise ValueError(f"{self.name} takes two halves, got {len(samples)} samples")
            real, fake = samples.chunk(2)
            return real, fake
        first, self._first = self._first, samples.detach() if self._first is None else None
        return first, samples

    def _points(self, device: torch.device) -> torch.Generator:
        self._pairs += 1
        assert self._sampling.session is not None
        mixed = self.seed * _PRIME**2 + self._sampling.session.number * _PRIME + self._pairs
        return torch.Generator(device).manual_seed(mixed % 2**63)


@final
class _Hook:
    """The forward hook; in a copy of the model it does nothing."""

    def __init__(self, plugin: GradientPenalty | None) -> None:
        self.plugin = plugin

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:  # noqa: ANN401 - any module's
        if self.plugin is None:
            return output
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise AttachError(
                f"{self.plugin.name} takes a critic that is called with one tensor and returns one"
            )
        return self.plugin.after_forward(module, inputs[0], output)

    def doors_open(self) -> list[tuple[str, Session]]:
        """Return the plugin that acts here and its session, none in a copied model."""
        session = None if self.plugin is None else self.plugin.session
        return [] if self.plugin is None or session is None else [(self.plugin.name, session)]

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


def _critic(model: nn.Module, on: str | None, plugin: str) -> nn.Module:
    found = {"": model} if on is None else modules.matching(model, on, argument="on")
    if len(found) > 1:
        raise AttachError(f"{plugin}: on={on!r} matches {', '.join(found)}; name one module")
    critic = next(iter(found.values()))
    if modules.is_compiled(model):
        raise AttachError(
            f"{plugin} needs the gradient of a gradient, which torch.compile does not give; attach"
            " it to a critic that is not compiled"
        )
    norm = next((one for one in critic.modules() if isinstance(one, _BATCH_NORMS)), None)
    if norm is not None:
        raise AttachError(
            f"{plugin} takes no critic with {type(norm).__name__}, which makes the slope at one"
            " sample depend on the others; use nn.LayerNorm, nn.GroupNorm or nn.InstanceNorm there"
        )
    if any(hasattr(param, "full_tensor") for param in critic.parameters()):
        raise AttachError(f"{plugin} takes no critic with sharded parameters")
    return critic
