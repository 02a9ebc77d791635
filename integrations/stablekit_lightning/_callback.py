"""The callback: which moment of a Trainer means what to the sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.errors import AttachError
from stablekit_lightning._refusals import refuse_strategy
from stablekit_lightning._sessions import Options, attach_all, detach_all, restore_all
from stablekit_lightning._traffic import Traffic

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from stablekit import Session

__all__ = ["StableKitCallback"]


@final
class StableKitCallback(Callback):
    """Attach plugins to the optimizers of ``trainer.fit``; nothing else changes.

    Plugins see the mean loss over the micro-batches of a step, gradients after the last of them,
    and parameter names as in the module. Metrics go to the Trainer's loggers. State travels in
    ``checkpoint["callbacks"]["stablekit"]``; resuming with ``ckpt_path`` restores it.

    ``gradient_clip_val`` next to a plugin that clips is an error. Without one it is allowed, and
    plugins then see what Lightning has clipped. DeepSpeed and FSDP1 are refused.

    Every ``fit`` has a session of its own, up to its end. In a second one plugins start afresh, as
    Lightning's optimizers do.

    Args:
        *plugins: as in :func:`stablekit.attach`.
        together: for modules with several optimizers (manual optimization): True if all of them
            step every time, False if they take turns and have a session each.
        log_every: how often metrics are given to the loggers, which write them every
            ``Trainer(log_every_n_steps=...)`` steps; None is 1 on CPU, 10 elsewhere; 0 never.
        device_mode, reduce_groups, dry_run: as in :func:`stablekit.attach`.

    Raises:
        AttachError: When ``fit`` starts: the module, the strategy or the plugins do not fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StableKitCallback("nonfinite-guard", "zclip")])
    """

    def __init__(
        self,
        *plugins: Any,  # noqa: ANN401 - instances, names, strings with keywords, mappings
        together: bool | None = None,
        log_every: int | None = None,
        device_mode: bool | None = None,
        reduce_groups: Sequence[ProcessGroup] | None = None,
        dry_run: bool = False,
    ) -> None:
        """Keep the arguments until there is an optimizer."""
        self.options = Options(plugins, together, log_every, device_mode, reduce_groups, dry_run)
        self.sessions: list[Session] = []
        self._traffic = Traffic([])
        self._pristine: list[dict[str, Any]] = []
        self._saved: list[dict[str, Any]] = []

    @property
    def session(self) -> Session:
        """The session of the current or latest ``fit``.

        Raises:
            AttachError: There was no ``fit`` yet, or it has several sessions: see ``sessions``.
        """
        if len(self.sessions) != 1:
            raise AttachError(f"expected one session, there are {len(self.sessions)}")
        return self.sessions[0]

    @property
    def state_key(self) -> str:
        """The key under ``checkpoint["callbacks"]``."""
        return "stablekit"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies; forget a state that was loaded for something else."""
        self._saved = []
        if stage == "fit":
            refuse_strategy(trainer)
            self.sessions = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, when optimizers have been restored, and continue from the loaded state."""
        restored = bool(self._saved)
        self.sessions = attach_all(trainer, pl_module, self.options, restored=restored)
        self._pristine = self._pristine or [session.state_dict() for session in self.sessions]
        restore_all(self.sessions, self._saved or self._pristine)
        self._traffic = Traffic(self.sessions)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note the loss of a micro-batch."""
        self._traffic.note(loss, trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Hand over the losses; Lightning calls this after backward, before its own clipping."""
        self._traffic.hand_over(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log metrics and events."""
        self._traffic.report(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all sessions, after ``fit`` too."""
        saved = [session.state_dict() for session in self.sessions] or self._saved
        return {"sessions": saved} if saved else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the sessions exist."""
        self._saved = state_dict["sessions"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take out the copy that the optimizers save, so that there is one truth to restore."""
        for state in checkpoint.get("optimizer_states", ()):
            state.pop("stablekit", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach; the sessions can still be read."""
        detach_all(self.sessions)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach; the sessions can still be read and saved."""
        detach_all(self.sessions)
