"""Recording a run: metrics and gradient norms of its steps, and all events, in a folder."""

from __future__ import annotations

import inspect
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist

import stablekit
from stablekit import hookimpl
from stablekit.arguments import number, plugin_name, whole
from stablekit_monitors._at_end import at_end_of
from stablekit_monitors._paths import path_of, with_temporary_folder
from stablekit_monitors._ranks import writes_here
from stablekit_monitors._record.chunk import OBSERVED
from stablekit_monitors._record.recording import Recording

if TYPE_CHECKING:
    import os

    from torch.optim import Optimizer

    from stablekit import Event, Session, Step
    from stablekit.hookspecs import Plugin

__all__ = ["Recorder"]


@final
class Recorder:
    """Record every step and every event in a folder that outlives the process.

    A row holds all metrics of the step, learning rate, loss, whether the step was skipped, and the
    norm of each tensor's gradient as backward left it. Rows are kept on the device and written to
    a file of their own by the thousand, or after ``flush_seconds``; events are written at once.
    A process that is killed loses the rows since then and nothing else: files are replaced in one
    piece. Nothing is forced to the disk, so a machine that loses power may lose the last files.

    Given the folder of an earlier run, a session that goes on from a checkpoint adds to it; steps
    done again replace those recorded before. A session that begins with its first step is a new
    run, and the one that is there is moved to ``earlier-1`` below it with a warning.

    Above ``max_bytes`` old files are thinned: pairs of them become one that holds every second row,
    the peaks of loss and norm, and rows with events; each row says how many steps it stands for.

    List it last: what plugins after it report at the end of a step is not in the row of that step.
    Of several processes only the first writes. If a loss is observed it is reduced for each row:
    one collective more under DDP, none under FSDP2, where it rides along with the norms.

    Args:
        path: the folder, made if it is missing.
        every: record each so many steps.
        chunk: how many rows make a file.
        flush_seconds: write rows that do not fill a file after so many seconds.
        max_bytes: about how much the folder may hold, None for no limit.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range.

    Example:
        >>> import tempfile, torch, stablekit
        >>> from stablekit_monitors import Recorder, read_run
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with stablekit.attach(optimizer, Recorder(folder), model=model):
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...     run = read_run(folder)
        >>> run.names, run.norms.round(3).tolist()
        (('weight', 'bias'), [[1.414, 1.0]])
    """

    cost = "a copy of the norms; one host read and one small file every 1024 steps"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
        chunk: int = 1024,
        flush_seconds: float = 30.0,
        max_bytes: int | None = 256 * 2**20,
        name: str | None = None,
    ) -> None:
        """Check the arguments; nothing is written before the first step."""
        self.path = path_of("path", path)
        self.every = whole("every", every, at_least=1)
        self.chunk = whole("chunk", chunk, at_least=1)
        self.flush_seconds = number("flush_seconds", flush_seconds, at_least=0)
        self.max_bytes = None if max_bytes is None else whole("max_bytes", max_bytes, at_least=1)
        self.name = plugin_name(name, "recorder")
        self._recording: Recording | None = None
        self._close: Any = None

    @classmethod
    def example(cls) -> Recorder:
        """Return a recorder into a temporary folder."""
        return with_temporary_folder(cls)

    @hookimpl
    def on_attach(self, session: Session) -> None:
        """Prepare to record this session.

        Raises:
            ValueError: Another session is being recorded.
        """
        if self._recording is not None and self._recording.is_open:
            raise ValueError(
                f"the recorder of {self.path} has a session already; make another Recorder"
            )
        self._recording = Recording(
            self.path,
            _about(session),
            every=self.every,
            chunk=self.chunk,
            flush_seconds=self.flush_seconds,
            max_bytes=self.max_bytes,
        )
        self._close = at_end_of(self, self._recording.close)

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Add a row."""
        is_due = step.number % self.every == 0
        values = dict(step.recorded)
        if is_due and "loss" not in values and (loss := step.loss) is not None:
            values["loss"] = loss
        if not writes_here():
            return
        assert self._recording is not None
        self._recording.follow(step)
        if is_due:
            known = {OBSERVED: 1.0} if "loss" in values else {}
            self._recording.row(step, {"lr": step.lr, **values, **known})

    @hookimpl
    def on_event(self, event: Event, step: Step) -> None:
        """Add the event."""
        if writes_here():
            assert self._recording is not None
            self._recording.event(event, step)

    @hookimpl
    def on_detach(self, session: Session) -> None:
        """Write what is left."""
        self._close()


def _about(session: Session) -> dict[str, Any]:
    """Return what run.json says about a session."""
    is_group = dist.is_available() and dist.is_initialized()
    return {
        "stablekit": stablekit.__version__,
        "torch": torch.__version__,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plugins": {name: _plugin(plugin) for name, plugin in session.plugins.items()},
        "optimizers": [_optimizer(optimizer) for optimizer in session.optimizers],
        "device_mode": not session.host,
        "dry_run": session.dry_run,
        "processes": dist.get_world_size() if is_group else 1,
    }


def _plugin(plugin: Plugin) -> str:
    """Return a plugin as the call that makes it, with the arguments it keeps."""
    known = inspect.signature(type(plugin)).parameters
    kept = {key: getattr(plugin, key) for key in known if hasattr(plugin, key)}
    return _call(plugin, kept)


def _optimizer(optimizer: Optimizer) -> str:
    return _call(optimizer, optimizer.defaults)


def _call(made: object, arguments: dict[str, Any]) -> str:
    plain = {k: v for k, v in arguments.items() if isinstance(v, (bool, int, float, str, tuple))}
    return f"{type(made).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"
