"""LogitClip: logits of bounded norm, so that a wrong label can only cost so much.

Wei et al.: Mitigating Memorization of Noisy Labels by Clipping the Model Prediction
(arXiv 2212.04055, ICML 2023). The paper rescales a row whose norm is above ``tau`` to ``tau``. The
authors' code (hongxin001/LogitClip) rescales it to ``1 / temp`` instead, where ``temp`` is what
its rows are compared with: at the README's 1.5 they end at 0.667. The two agree at 1 only; the
second is ``form="repository"`` here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from stablekit import hookimpl
from stablekit.arguments import plugin_name
from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit_logits._criteria import LogitClipLoss
from stablekit_logits._door import door
from stablekit_logits._heads import module_name, output_embedding
from stablekit_logits._logit_norms import checked, clip_logits, lowest_loss, row_norms

if TYPE_CHECKING:
    from stablekit import Session, Step
    from stablekit_logits._loss_call import LossCall

__all__ = ["LogitClip", "LogitClipLoss", "clip_logits", "lowest_loss"]

_TOO_MUCH = 1.0


@final
class LogitClip:
    """Rescale the logits of every row to a norm of at most ``tau``, in training only.

    ``z * min(1, tau / ||z||)``: the loss of a row lies between ``log(1 + (K-1) exp(-2 tau))`` and
    ``log(1 + (K-1) exp(2 tau))``, and the gradient of a clipped row is orthogonal to it. Made for
    classifiers of noisy labels. Evaluation sees the logits as they are.

    Not for language models at small ``tau``: with ``K`` classes no loss below
    ``log(1 + (K-1) exp(-tau sqrt(K / (K-1))))`` is in reach, 9.3 nats for 50257 words at
    ``tau=1.5``, where guessing costs 10.8. What acts on a model's output embedding is refused
    where that floor is above 1 nat.

    Metrics: ``clipped``, the share of rows; ``norm``, their mean norm before; ``threshold``.
    Rows whose label is ignored are neither changed nor counted; with ``on`` labels are not known
    and all rows are.

    Args:
        tau: the largest norm, above 0; 0.5 to 2 for ten classes.
        p: which norm, at least 1; may be infinite.
        form: "paper" or "repository", the rule of the authors' code (its ``temp`` is ``tau``).
        on: name of the module that makes the logits ("classifier", "score", "head"). None takes
            what the model gives to its ``loss_function``, as models of transformers do.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
        AttachError: There is no such module or loss, or the loss would have too high a floor.

    Example:
        >>> import stablekit
        >>> model = nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> session = stablekit.attach(optimizer, LogitClip(0.5, on=""), model=model)
        >>> model(torch.full((1, 2), 50.0)).norm().round(decimals=4)
        tensor(0.5000, grad_fn=...)
        >>> session.detach()
    """

    needs = ("model", "loss")
    cost = "two reads of the logits and one write, and one reduction over ranks"

    def __init__(
        self,
        tau: float = 1.0,
        *,
        p: float = 2.0,
        form: str = "paper",
        on: str | int | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.tau, self.p, self.form = checked(tau, p, form)
        self.on = module_name(on)
        self.name = plugin_name(name, "logit-clip")
        self._door = door(
            self.name,
            "clipped",
            "norm",
            on=self.on,
            around=self._around,
            through=self._through,
            instead=f"name the module that makes the logits with on= ({self.name}:on={{head}}), or"
            " compute the loss with stablekit_logits.LogitClipLoss",
        )

    @classmethod
    def example(cls) -> LogitClip:
        """Return an instance for any model that returns a tensor."""
        return cls(on="")

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Step onto the way of the logits.

        Raises:
            AttachError: It cannot, or the bound is too small for that many classes.
        """
        self._refuse_high_floor(modules.model_of(session, self.name))
        self._door.open(session)

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Make sure that there were logits."""
        self._door.check(step)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record how much was clipped."""
        self._door.tally.record(step)
        step.record("threshold", self.tau)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Leave the model as it was."""
        self._door.close(session)

    def _around(self, call: LossCall) -> Tensor:
        valid = (call.targets() != call.ignore_index).unsqueeze(-1)
        clipped = self._clip(call.logits, valid)
        return call.loss(logits=torch.where(valid, clipped, call.logits))

    def _through(self, logits: Tensor) -> Tensor:
        return self._clip(logits, torch.ones_like(logits[..., :1], dtype=torch.bool))

    def _clip(self, rows: Tensor, valid: Tensor) -> Tensor:
        norms = row_norms(rows.detach(), self.p)
        clipped = (norms > self.tau) & valid
        self._door.tally.add(valid.sum(), clipped.sum(), norms.where(valid, 0).sum())
        return clip_logits(rows, self.tau, p=self.p, form=self.form)

    def _refuse_high_floor(self, model: nn.Module) -> None:
        words = _vocabulary(model, self.on)
        floor = lowest_loss(self.tau, words, p=self.p, form=self.form)
        if floor > _TOO_MUCH:
            raise AttachError(
                f"{self.name}: with tau={self.tau:g} no cross-entropy below {floor:.2f} nats is in"
                f" reach for the {words} words of {type(model).__name__}, where guessing costs"
                f" {lowest_loss(1e-12, words):.2f}. Logit clipping is for classifiers of few"
                f" classes; a tau above {_smallest_tau(words, self.p, self.form):.1f} is taken"
            )


def _vocabulary(model: nn.Module, on: str | None) -> int:
    """Return how many words the clipped logits are over, 0 where they are those of a classifier."""
    head = output_embedding(model)
    if head is None:
        return 0
    width = modules.width_of(head)
    if on is None:
        return width
    named = modules.matching(model, on, argument="on").values()
    return width if any(one is head or one is model for one in named) else 0


def _smallest_tau(words: int, p: float, form: str) -> float:
    low = 1.0
    while lowest_loss(low, words, p=p, form=form) > _TOO_MUCH:
        low *= 1.02
    return low
