"""Plugin-based optimizer and training-stability middleware for PyTorch."""

from stablekit._attach import attach, session, wrap
from stablekit._selection import only
from stablekit._session import Session
from stablekit.catalogue import PluginInfo, available, create
from stablekit.events import Event
from stablekit.gradients import Gradients
from stablekit.hookspecs import Plugin, hookimpl
from stablekit.step import Step

__all__ = [
    "Event",
    "Gradients",
    "Plugin",
    "PluginInfo",
    "Session",
    "Step",
    "__version__",
    "attach",
    "available",
    "create",
    "hookimpl",
    "only",
    "session",
    "wrap",
]

__version__ = "0.1.0"
