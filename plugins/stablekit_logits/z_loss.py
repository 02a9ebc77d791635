"""Holding the log-partition function of the logits near 0, where low precision has its digits.

Chowdhery et al.: PaLM (arXiv 2204.02311), section 5, ``weight`` 1e-4; the router loss of mixtures
of experts (Zoph et al.: ST-MoE, arXiv 2202.08906) is another term, on other logits. The reference
is OLMo-core's ``cross_entropy_loss``: the same numbers; its recipes take 1e-5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from stablekit import hookimpl
from stablekit.arguments import choice, number, plugin_name
from stablekit.errors import AttachError
from stablekit_logits._door import LossCall, door
from stablekit_logits._heads import module_name

if TYPE_CHECKING:
    from stablekit import Session, Step

__all__ = ["ZLoss", "ZLossCrossEntropy", "cross_entropy_and_z_loss", "z_loss"]

_REDUCTIONS = ("mean", "sum", "none")


def z_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return ``logsumexp(z) ** 2``, on average over rows; in float32.

    Its gradient is ``2 logsumexp(z) softmax(z) / rows``.

    Args:
        logits: ``[..., classes]``.
        labels: ``[...]``, already shifted for a causal language model; None counts all rows.
        ignore_index: rows with this label do not count.
        reduction: "mean" over the rows that count, "sum", or "none".

    Raises:
        ValueError: The reduction is not known.

    Example:
        >>> z_loss(torch.zeros(1, 4))  # log(4) ** 2
        tensor(1.9218)
    """
    counted = None if labels is None else labels != ignore_index
    return _reduced(_wide(logits).logsumexp(-1).square(), counted, reduction)


def cross_entropy_and_z_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy ``logsumexp(z) - z_y`` and the z-loss, of one logsumexp.

    Args:
        logits: ``[..., classes]``.
        labels: ``[...]``, already shifted for a causal language model.
        ignore_index: rows with this label do not count.
        reduction: "mean" over the rows that count, "sum", or "none".

    Raises:
        ValueError: The reduction is not known.

    Example:
        >>> cross_entropy_and_z_loss(torch.zeros(1, 4), torch.tensor([2]))
        (tensor(1.3863), tensor(1.9218))
    """
    counted = labels != ignore_index
    rows = _wide(logits)
    found = rows.logsumexp(-1)
    own = rows.gather(-1, torch.where(counted, labels, 0)[..., None]).squeeze(-1)
    return _reduced(found - own, counted, reduction), _reduced(found.square(), counted, reduction)


@final
class ZLossCrossEntropy(nn.Module):
    """Cross entropy plus ``weight`` times the z-loss; evaluation mode leaves the z-loss out.

    Args:
        weight: at least 0.
        ignore_index: rows with this label do not count.
        reduction: "mean" over the rows that count, "sum", or "none".

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> loss, batch = ZLossCrossEntropy(0.1), (torch.zeros(1, 4), torch.tensor([2]))
        >>> loss(*batch), loss.eval()(*batch)
        (tensor(1.5785), tensor(1.3863))
    """

    def __init__(
        self, weight: float = 1e-4, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        """Check the arguments."""
        super().__init__()
        self.weight = number("weight", weight, at_least=0)
        self.ignore_index = ignore_index
        self.reduction = choice("reduction", reduction, _REDUCTIONS)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits ``[..., classes]`` and labels ``[...]``."""
        ce, z = cross_entropy_and_z_loss(
            logits, labels, ignore_index=self.ignore_index, reduction=self.reduction
        )
        return ce + self.weight * z if self.training and self.weight else ce


@final
class ZLoss:
    """Add ``weight * mean(logsumexp(logits) ** 2)`` to the loss, in training.

    On the loss function of a model of transformers: rows with the label -100 do not count, and the
    sum over rows is divided as the cross entropy is, by ``num_items_in_batch`` where Trainer gives
    it, so that gradient accumulation makes no difference. Evaluation losses are those of the model.
    With SoftCap the capped logits count; with ``on=`` only if SoftCap is listed first.

    With ``on``, in any model: a module's output goes on as it is, and its gradient gets that of the
    term. There are no labels there, so all rows count, and the loss that is reported is without the
    term. The module does not know what the loss is multiplied with on its way: where it is divided
    by K for accumulation divide ``weight`` by K too. float16 is refused, whose losses are scaled.

    Metrics, means over rows: ``z``, the square before ``weight``; ``ce``, the loss without the term
    (not with ``on``).

    Args:
        weight: at least 0; with 0 the term is recorded and not added.
        on: name of the module whose output are the logits ("head"), "" for the model itself; None
            is the loss function.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
        AttachError: There is no model, its loss function is not known or not used, or its forward
            is Liger's.

    Example:
        >>> import stablekit
        >>> model = nn.Linear(2, 4, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> session = stablekit.attach(optimizer, ZLoss(on=""), model=model)
        >>> logits = model(torch.zeros(3, 2))
        >>> nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        >>> optimizer.step()
        >>> session.metrics()["z-loss/z"]  # log(4) ** 2
        1.92181
    """

    needs = ("model", "loss")
    cost = "in every forward pass one logsumexp of the logits; one reduction over ranks"

    def __init__(
        self, weight: float = 1e-4, *, on: str | int | None = None, name: str | None = None
    ) -> None:
        """Check the arguments."""
        self.weight = number("weight", weight, at_least=0)
        self.on = module_name(on)
        self.name = plugin_name(name, "z-loss")
        metrics = ("z", "ce") if self.on is None else ("z",)
        self._door = door(
            self.name,
            *metrics,
            on=self.on,
            around=self._around,
            through=self._through,
            instead=f"name the module that makes the logits with on= ({self.name}:on={{head}}; that"
            " one does not know what the loss is multiplied with: divide weight by the number of"
            " micro-batches a step, use no GradScaler), or add stablekit_logits.z_loss to the loss",
        )

    @classmethod
    def example(cls) -> ZLoss:
        """Return one for any model that returns a tensor."""
        return cls(on="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Step between the model and its loss, or listen to the module."""
        self._door.open(session)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Refuse to train on a loss without the term, or with one that is lost beside the loss."""
        self._door.check(step)
        optimizers = step.session.optimizers if self.on is not None and self.weight else ()
        if any(getattr(one, "grad_scale", None) is not None for one in optimizers):
            raise AttachError(
                f"{self.name}: a GradScaler multiplies the loss, and the term that on={self.on!r}"
                " adds to the gradient is not multiplied; use the loss function (on=None),"
                " bfloat16 without a scaler, or stablekit_logits.z_loss in the loss"
            )

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what the forward passes showed."""
        self._door.tally.record(step)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Let the model go."""
        self._door.close(session)

    def _around(self, call: LossCall) -> Tensor:
        targets = call.targets()
        total = z_loss(call.logits, targets, ignore_index=call.ignore_index, reduction="sum")
        count = (targets != call.ignore_index).sum()
        loss = call.loss()
        self._door.tally.add(count, total, call.whole(loss, count))
        return loss + self.weight * call.share(total, count) if self.weight else loss

    def _through(self, logits: Tensor) -> Tensor:
        if logits.dtype == torch.float16:
            raise AttachError(
                f"{self.name}: logits are float16, whose loss is multiplied by a loss scale that a"
                " module does not know; use the loss function (on=None), bfloat16, or"
                " stablekit_logits.z_loss in the loss"
            )
        with torch.no_grad():
            squares = z_loss(logits, reduction="none")
            rows = torch.full((), squares.numel(), device=squares.device)
            self._door.tally.add(rows, squares.sum())
        if not self.weight:
            return logits
        passed: Tensor = _Pull.apply(logits, self.weight)  # type: ignore[no-untyped-call]
        return passed


class _Pull(torch.autograd.Function):
    """The identity, in whose gradient is that of the z-loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: float) -> Tensor:  # noqa: ANN401 - as torch
        ctx.save_for_backward(logits)
        ctx.weight = weight
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as torch
        (logits,) = ctx.saved_tensors
        rows = _wide(logits)
        found = rows.logsumexp(-1, keepdim=True)
        step = (2 * ctx.weight / found.numel()) * found * (rows - found).exp()
        return gradient + step.to(gradient.dtype), None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _reduced(values: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    choice("reduction", reduction, _REDUCTIONS)
    if counted is not None:
        values = torch.where(counted, values, 0.0)
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / (values.numel() if counted is None else counted.sum())
