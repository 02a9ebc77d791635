"""The geometry of the two embeddings that a contrastive model pulls together.

Wang and Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity
on the Hypersphere (arXiv 2005.10242); Liang et al.: Mind the Gap (arXiv 2203.02053), the modality
gap; Radford et al.: CLIP (arXiv 2103.00020), which keeps the logit scale at most at 100.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stablekit import hookimpl
from stablekit.arguments import flag, plugin_name, whole
from stablekit.errors import AttachError
from stablekit.forward import Sampling, Slots, modules
from stablekit_monitors._pairing import Pairing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step

__all__ = ["ContrastiveMonitor", "alignment", "modality_gap", "uniformity"]

_PAIRED = 1024
_SCALE = "logit_scale"


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Return how far apart partners are: the mean of ``|x_i - y_i| ** 2``; 0 is perfect.

    Args:
        x: unit vectors ``[n, d]``.
        y: their partners, likewise.

    Example:
        >>> alignment(torch.eye(2), -torch.eye(2))
        tensor(4.)
    """
    return (x - y).square().sum(1).mean()


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance of the two centroids, between 0 and 2.

    Args:
        x: unit vectors ``[n, d]``.
        y: likewise.

    Example:
        >>> modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.4142)
    """
    gap: Tensor = torch.linalg.vector_norm(x.mean(0) - y.mean(0))
    return gap


def uniformity(x: Tensor) -> Tensor:
    """Return ``log`` of the mean of ``exp(-2 |x_i - x_j| ** 2)`` over pairs; lower is more even.

    Args:
        x: unit vectors ``[n, d]``, n at least 2.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)
    """
    return _nearness(x).mean().log()


@final
class ContrastiveMonitor:
    """Record the geometry of a contrastive model's two embeddings, in one step of so many.

    Embeddings are taken to unit length. Each forward pass (micro-batch, rank) is measured for
    itself; the step's value is the mean over passes, for ``uniformity`` the log of the mean over
    all pairs of the first 1024 rows. Forward passes in evaluation mode or without gradients are not
    looked at.

    Metrics, without unit:

    * ``alignment``: mean squared distance of partners, 0 to 4; 2 for strangers. Falls in training,
      in CLIP to about 1.4, which is a cosine of 0.3.
    * ``uniformity_first``, ``uniformity_second``: 0 where all embeddings are one point (collapse),
      -4 where they are spread evenly in many dimensions. Healthy: falling, below -2.
    * ``gap``: distance of the centroids, 0 to 2. Models like CLIP keep one of about 0.8; what
      matters is a change. A small batch adds noise of about ``2 / batch`` to its square.
    * ``logit_scale``: ``exp`` of the model's parameter of that name, if it has one, after the
      update. CLIP starts at 14 and is held at 100 at most; one that runs away is a warning.

    NaN: no training batch was seen, or none with two rows.

    Event "unseen": there were no such embeddings in the first sampled step.

    Args:
        every: sample the steps whose number this divides, at least 1.
        first: name of the module whose output is the first embedding, ``[n, d]``.
        second: name of the module of the second. None for both takes ``image_embeds`` and
            ``text_embeds`` of the model's output, as CLIPModel and SiglipModel have them.
        reduce: agree with all ranks, which costs one reduction in a sampled step.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or only one module is named.

    Example:
        >>> import stablekit
        >>> towers = nn.ModuleDict({"image": nn.Linear(3, 2), "text": nn.Linear(4, 2)})
        >>> optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
        >>> monitor = ContrastiveMonitor(every=1, first="image", second="text")
        >>> session = stablekit.attach(optimizer, monitor, model=towers)
        >>> x, y = towers["image"](torch.randn(5, 3)), towers["text"](torch.randn(5, 4))
        >>> (x * y).sum().backward()
        >>> optimizer.step()
        >>> 0 <= session.metrics()["contrastive-monitor/gap"] <= 2
        True
    """

    needs = ("model",)
    cost = (
        "in sampled steps the products of all pairs of up to 1024 embeddings and one reduction"
        " over ranks, and a gather of a logit_scale that is sharded; otherwise one flag"
    )

    def __init__(
        self,
        every: int = 100,
        *,
        first: str | None = None,
        second: str | None = None,
        reduce: bool = True,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.every = whole("every", every, at_least=1)
        self.first = modules.pattern("first", first)
        self.second = modules.pattern("second", second)
        if (first is None) != (second is None):
            raise ValueError(
                f"name both embeddings or none, got first={first!r}, second={second!r}"
            )
        self.reduce = flag("reduce", reduce)
        self.name = plugin_name(name, "contrastive-monitor")
        self._sampling = Sampling(self.every)
        self._slots: Slots | None = None
        self._scale: nn.Parameter | None = None

    @classmethod
    def example(cls) -> ContrastiveMonitor:
        """Return one that takes any model's output for both embeddings."""
        return cls(every=1, first="", second="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Listen to the model, or to the modules named."""
        model = modules.model_of(session, self.name)
        sides = {"first": self.first, "second": self.second}
        named = {side: _one(model, side, name) for side, name in sides.items() if name is not None}
        self._slots = Slots(self._sampling, 1, sums=7, device=modules.device_of(model))
        if named:
            pairing = Pairing(self._slots, geometry)
            for place, module in enumerate(named.values()):
                self._sampling.after(module, partial(pairing.see, place))
        else:
            self._slots.watch(0, model, _look)
        params = model.named_parameters()
        self._scale = next((p for name, p in params if name.split(".")[-1] == _SCALE), None)
        self._sampling.attach(session)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what a sampled step saw."""
        if self._sampling.is_armed and self._slots is not None:
            sums = self._slots.take(reduce=self.reduce)[0]
            passes, gap, rows, apart, pairs, near_first, near_second = sums.unbind()
            step.record("gap", gap / passes)
            step.record("alignment", apart / rows)
            step.record("uniformity_first", (near_first / pairs).log())
            step.record("uniformity_second", (near_second / pairs).log())
            if self._scale is not None:
                step.record(_SCALE, modules.whole(self._scale).float().exp().reshape(-1)[0])
            self._sampling.complain(step, passes > 0, "no two embeddings were seen")
        self._sampling.arm(step.number)

    @hookimpl
    def on_detach(self) -> None:
        """Let the model go."""
        self._sampling.detach()
        self._slots, self._scale = None, None

    def state_dict(self) -> dict[str, Any]:
        """Return whether the step to come is sampled."""
        return self._sampling.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: A field is not a bool.
        """
        self._sampling.load_state_dict(state)


def geometry(x: Tensor, y: Tensor) -> Tensor | None:
    """Return sums over one forward pass; see ``on_step_end`` for what they are.

    None where the two are not rows of one length, one a partner of the other.
    """
    if x.ndim != 2 or x.shape != y.shape or not x.numel():
        return None
    with torch.autocast(x.device.type, enabled=False):
        x, y = normalize(x.float(), dim=1), normalize(y.float(), dim=1)
        near_x, near_y = _nearness(x), _nearness(y)
        rows = torch.full_like(x[0, 0], x.shape[0])
        return torch.stack(
            [
                torch.ones_like(rows),
                modality_gap(x, y),
                rows,
                alignment(x, y) * rows,
                torch.full_like(rows, near_x.numel()),
                near_x.sum(),
                near_y.sum(),
            ]
        )


def _nearness(x: Tensor) -> Tensor:
    """Return ``exp(-2 |x_i - x_j| ** 2)`` of every pair of rows."""
    x = x[:_PAIRED]
    i, j = torch.triu_indices(x.shape[0], x.shape[0], offset=1, device=x.device)
    return ((x @ x.T)[i, j] * 4 - 4).exp()


def _look(output: Any) -> Tensor | None:  # noqa: ANN401 - any model's output
    first, second = getattr(output, "image_embeds", None), getattr(output, "text_embeds", None)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    return geometry(modules.whole(first), modules.whole(second))


def _one(model: nn.Module, side: str, name: str) -> nn.Module:
    found = modules.matching(model, name, argument=side)
    if len(found) > 1:
        raise AttachError(f"{side}={name!r} must name one module, it matches {', '.join(found)}")
    return next(iter(found.values()))
