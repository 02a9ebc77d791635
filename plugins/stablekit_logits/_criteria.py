"""The methods as losses, for training loops that compute the loss themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from stablekit.arguments import choice, flag, fraction, number
from stablekit_logits._error_norms import error_norms, truncation_mask
from stablekit_logits._logit_norms import checked, clip_logits
from stablekit_logits._slopes import gradient_penalty

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DIVISORS",
    "ErrorNormLoss",
    "GradientPenaltyLoss",
    "LogitClipLoss",
    "bounds",
]

DIVISORS = ("valid", "kept")


@final
class LogitClipLoss(nn.Module):
    """Any loss, of logits whose rows are clipped while the module is in training mode.

    Args:
        loss: takes logits and targets; None is ``nn.CrossEntropyLoss()``.
        tau: the largest norm of a row, above 0.
        p: which norm, at least 1; may be infinite.
        form: "paper" or "repository", see :func:`clip_logits`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range; or, in use, the classes of ``nn.CrossEntropyLoss``
            are not the last dim.

    Example:
        >>> import torch
        >>> criterion = LogitClipLoss(tau=1.0)
        >>> criterion(torch.tensor([[60.0, 0.0]]), torch.tensor([1]))  # not 60
        tensor(1.3133)
        >>> criterion.eval()(torch.tensor([[60.0, 0.0]]), torch.tensor([1]))
        tensor(60.)
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        tau: float = 1.0,
        p: float = 2.0,
        form: str = "paper",
    ) -> None:
        """Check the arguments."""
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.tau, self.p, self.form = checked(tau, p, form)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of ``[..., classes]`` logits, clipped in training mode."""
        if logits.ndim > 2 and isinstance(self.loss, nn.CrossEntropyLoss):
            raise ValueError(
                "LogitClipLoss clips along the last dim, but nn.CrossEntropyLoss has the classes in"
                f" dim 1; flatten logits of shape {list(logits.shape)} to [rows, classes]"
            )
        if self.training:
            logits = clip_logits(logits, self.tau, p=self.p, form=self.form)
        return self.loss(logits, targets)


@final
class ErrorNormLoss(nn.Module):
    """Cross-entropy without the tokens whose error norm is too large, in training mode.

    Warming up is the caller's business: until the model knows what is likely, every token is far
    off. The plugin counts the steps.

    Args:
        threshold: leave out tokens with an error norm above it, from 0 to sqrt(2).
        fraction: or leave out this share of them; exactly one of the two.
        divisor: "valid" divides by the number of all labels that are not ignored, as the authors'
            script for language models does, "kept" by the number of those left in.
        ignore_index: the label of what is no token.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or not exactly one of threshold and fraction given.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1])
        >>> ErrorNormLoss(1.2)(logits, labels)  # half of the loss of the first
        tensor(0.0091)
        >>> ErrorNormLoss(fraction=0.5, divisor="kept")(logits, labels)
        tensor(0.0181)
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        fraction: float | None = None,
        divisor: str = "valid",
        ignore_index: int = -100,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        self.threshold, self.fraction = bounds(threshold, fraction)
        self.divisor = choice("divisor", divisor, DIVISORS)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of ``[..., classes]`` logits; the plain mean in evaluation mode."""
        rows, flat = logits.flatten(0, -2), labels.flatten()
        valid = flat != self.ignore_index
        kept = valid
        if self.training:
            norms = error_norms(rows, flat, ignore_index=self.ignore_index)
            kept = valid & ~truncation_mask(
                norms, threshold=self.threshold, fraction=self.fraction, valid=valid
            )
        total = nn.functional.cross_entropy(
            rows,
            flat.where(kept, self.ignore_index),
            ignore_index=self.ignore_index,
            reduction="sum",
        )
        return total / (kept if self.divisor == "kept" else valid).sum().clamp(min=1)


@final
class GradientPenaltyLoss(nn.Module):
    """The critic's loss of WGAN-GP: ``D(fake).mean() - D(real).mean() + weight * penalty``.

    Args:
        weight: of the penalty, at least 0.
        one_sided: let slopes below 1 be.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``weight`` is negative; or, in use, the shapes of real and fake differ.

    Example:
        >>> import torch
        >>> critic, loss = nn.Linear(2, 1), GradientPenaltyLoss(weight=10.0)
        >>> loss(critic, torch.randn(4, 2), torch.randn(4, 2)).backward()
    """

    def __init__(self, weight: float = 10.0, *, one_sided: bool = False) -> None:
        """Check the arguments."""
        super().__init__()
        self.weight = number("weight", weight, at_least=0)
        self.one_sided = flag("one_sided", one_sided)

    def forward(self, critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss; the generator gets no gradient from it."""
        distance = critic(fake.detach()).mean() - critic(real).mean()
        if not self.weight:
            return distance
        return distance + self.weight * gradient_penalty(
            critic, real, fake, one_sided=self.one_sided
        )


def bounds(threshold: float | None, share: float | None) -> tuple[float | None, float | None]:
    """Return threshold and fraction, checked.

    Raises:
        TypeError: One of them is not a number.
        ValueError: Both or none are given, or one is out of range.

    Example:
        >>> bounds(1.2, None)
        (1.2, None)
    """
    if (threshold is None) == (share is None):
        raise ValueError(
            f"exactly one of threshold and fraction must be given, got threshold={threshold!r} and"
            f" fraction={share!r}"
        )
    if threshold is not None:
        return number("threshold", threshold, at_least=0), None
    assert share is not None
    return None, fraction("fraction", share, closed=True)
