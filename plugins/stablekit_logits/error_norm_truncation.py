"""Error Norm Truncation: leave tokens out of the loss that the model finds most unlikely.

Li et al.: Error Norm Truncation: Robust Training in the Presence of Data Noise for Text Generation
Models (arXiv 2310.00840, ICLR 2024). In the authors' code (tianjianl/error_norm_truncation) the
script for language models divides by all positions, padding included, and its fraction is of whole
sequences; the fairseq criterion takes the fraction of single tokens, padding included in the count,
and sums. Here tokens count if their label is not ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import choice, plugin_name, whole
from stablekit.forward import Sampling, Slots, modules
from stablekit_logits._criteria import DIVISORS, ErrorNormLoss, bounds
from stablekit_logits._criterion_door import CriterionDoor
from stablekit_logits._error_norms import error_norms, judged, largest_count, truncation_mask
from stablekit_logits._heads import module_name
from stablekit_logits._loss_door import LossDoor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Session, Step
    from stablekit_logits._loss_call import LossCall

__all__ = ["ErrorNormLoss", "ErrorNormTruncation", "error_norms", "truncation_mask"]


@final
class ErrorNormTruncation:
    """Leave out of the loss the tokens whose error norm is above a threshold, or the worst share.

    ``e = ||softmax(z) - onehot(y)||``, from 0 to sqrt(2): near sqrt(2) where the model is sure of
    another token. The label of what is left out becomes the ignored one, so its gradient is 0; the
    decision has no gradient. It also leaves out what is rare and right: watch ``dropped``.

    Metrics: ``dropped``, the share of labels left out; ``error_norm``, the mean of all labels;
    ``loss_kept`` and ``loss_dropped``, the mean loss of those kept and left out, NaN where there
    are none. Nothing is measured while warming up.

    Args:
        threshold: leave out tokens with a larger error norm; 1.1 to 1.35 are of use, sqrt(2) and
            more leave nothing out.
        fraction: or leave out this share of the tokens of each forward pass (micro-batch, rank),
            from 0 to 1, rounded down to whole tokens: of 8 rows 0.1 is none, which the event
            "too-few" tells once. Exactly one of the two is given.
        warmup_steps: how many updates are applied before it acts, at least 1: a model that has
            learned nothing is far off everywhere.
        divisor: "valid" leaves the loss divided by the number of all tokens, so that the effective
            learning rate falls with the share left out, as in the authors' script. "kept" divides
            by the number of those kept; where the loss is divided by ``num_items_in_batch``
            (Trainer), which tokens are kept is known after the last micro-batch only, so the whole
            gradient is multiplied by the ratio of the two numbers, over all ranks: list it before
            clippers. After a step that a GradScaler dropped, its tokens count in that ratio too.
        on: name of an ``nn.CrossEntropyLoss`` in the model. None takes the model's
            ``loss_function``, as models of transformers have it.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or not exactly one of threshold and fraction given.
        AttachError: There is no such loss.

    Example:
        >>> import stablekit
        >>> net, loss = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
        >>> model = torch.nn.ModuleDict({"net": net, "loss": loss})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plugin = ErrorNormTruncation(fraction=0.25, warmup_steps=1, on="loss")
        >>> session = stablekit.attach(optimizer, plugin, model=model)
        >>> for _ in range(2):
        ...     loss(net(torch.randn(8, 2)), torch.arange(8) % 3).backward()
        ...     optimizer.step()
        >>> session.metrics()["error-norm-truncation/dropped"]
        0.25
    """

    needs = ("model", "loss")
    cost = (
        "after the warm-up three reads of the logits, 64 MB at a time in float32, and one reduction"
        " over ranks"
    )

    def __init__(
        self,
        threshold: float | None = None,
        *,
        fraction: float | None = None,
        warmup_steps: int,
        divisor: str = "valid",
        on: str | int | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.threshold, self.fraction = bounds(threshold, fraction)
        self.warmup_steps = whole("warmup_steps", warmup_steps, at_least=1)
        self.divisor = choice("divisor", divisor, DIVISORS)
        self.on = module_name(on)
        self.name = plugin_name(name, "error-norm-truncation")
        self._updates = 0
        self._acts = False
        self._slots: Slots | None = None
        self._sums: Tensor | None = None
        self._was_told: Tensor | None = None
        self._door: LossDoor | CriterionDoor = (
            LossDoor(
                self.name,
                around=self._around,
                instead="compute the loss with stablekit_logits.ErrorNormLoss (compute_loss_func=),"
                " or name an nn.CrossEntropyLoss that is part of the model with on=",
            )
            if self.on is None
            else CriterionDoor(self.name, on=self.on, around=self._around)
        )

    @classmethod
    def example(cls) -> ErrorNormTruncation:
        """Return an instance for a model with its loss in it, under the name "loss"."""
        return cls(fraction=0.25, warmup_steps=2, divisor="kept", on="loss")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Step between the model and its loss.

        Raises:
            AttachError: It cannot.
        """
        device = modules.device_of(modules.model_of(session, self.name))
        self._door.open(session)
        sampling = Sampling(every=1)
        sampling.attach(session)
        self._slots = Slots(sampling, 1, sums=len(_Sums._fields), device=device)
        self._was_told = torch.zeros((), dtype=torch.bool, device=device)
        self._has_applied(session.updates)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Make sure that there was a loss, and agree with all ranks on what was left out."""
        self._door.check(step)
        if self._acts and self._slots is not None:
            self._sums = self._slots.take(reduce=True)[0]

    @hookimpl
    def transform_gradients(self, step: Step) -> None:
        """Divide by the number of tokens kept where the loss could not."""
        if self.divisor == "kept" and self._sums is not None:
            sums = _Sums(*self._sums.unbind())
            factor = sums.owed / (sums.owed - sums.owed_dropped)
            step.gradients.scale_(torch.where(factor.isfinite(), factor, 1.0))

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record what was left out."""
        if self._sums is not None:
            sums = _Sums(*self._sums.float().unbind())
            step.record("dropped", sums.dropped / sums.valid)
            step.record("error_norm", sums.norm / sums.valid)
            step.record("loss_kept", sums.loss_kept / (sums.valid - sums.dropped))
            step.record("loss_dropped", sums.loss_dropped / sums.dropped)
            if self.fraction:
                self._tell_of_too_few(step, sums)
            self._sums = None
        if self._slots is not None:
            self._slots.clear()
        self._has_applied(step.session.updates)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Leave the model as it was."""
        if self._door.session is session:
            self._door.close(session)
            self._slots = self._sums = self._was_told = None

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates were applied."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue.

        Raises:
            TypeError: The number is not an integer.
            ValueError: It is negative.
        """
        self._has_applied(whole("updates", state["updates"]))

    def _has_applied(self, updates: int) -> None:
        # A flag that changes once, and not a number: a compiled forward pass is compiled twice.
        self._updates, self._acts = updates, updates >= self.warmup_steps

    def _around(self, call: LossCall) -> Tensor:
        if not self._acts:
            return call.loss()
        targets = call.targets()
        valid = targets != call.ignore_index
        norms, losses = judged(call.logits, targets, ignore_index=call.ignore_index)
        dropped = truncation_mask(
            norms, threshold=self.threshold, fraction=self.fraction, valid=valid
        )
        self._count(valid, dropped, norms, losses, is_owed=call.num_items is not None)
        loss = call.loss(targets=targets.masked_fill(dropped, call.ignore_index))
        if call.num_items is not None:
            return loss
        kept = valid.sum() - dropped.sum()
        share = kept / valid.sum() if self.divisor == "valid" else torch.ones_like(loss)
        return torch.where(dropped.any() & (kept == 0), 0.0, loss * share.to(loss.dtype))

    def _tell_of_too_few(self, step: Step, sums: _Sums) -> None:
        """Emit "too-few" in the first step in which no forward pass had a token to leave out."""
        assert self._was_told is not None
        is_idle = (sums.most == 0) & (sums.valid > 0)
        step.emit(
            "too-few",
            f"{self.name}: fraction={self.fraction} of the tokens of a forward pass, rounded down,"
            " is none, so nothing is left out; take larger (micro-)batches, a larger fraction, or"
            " threshold=",
            when=is_idle & ~self._was_told,
        )
        self._was_told = self._was_told | is_idle

    @torch.no_grad()
    def _count(
        self, valid: Tensor, dropped: Tensor, norms: Tensor, losses: Tensor, *, is_owed: bool
    ) -> None:
        if self._slots is not None:
            count, share = valid.sum(), self.fraction
            sums = _Sums(
                valid=count,
                dropped=dropped.sum(),
                norm=norms.sum(),
                loss_kept=losses.masked_fill(dropped, 0).sum(),
                loss_dropped=losses.where(dropped, 0).sum(),
                most=count if share is None else largest_count(count, share),
                owed=count * is_owed,
                owed_dropped=dropped.sum() * is_owed,
            )
            self._slots.put(0, torch.stack([one.float() for one in sums]))


class _Sums(NamedTuple):
    """Of the forward passes of a step; what is owed is divided by all tokens of the step.

    ``most`` is how many may be left out at all.
    """

    valid: Tensor
    dropped: Tensor
    norm: Tensor
    loss_kept: Tensor
    loss_dropped: Tensor
    most: Tensor
    owed: Tensor
    owed_dropped: Tensor
