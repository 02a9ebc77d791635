"""The machine on which the table was made, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Return processor, cores and versions; nothing that identifies the machine."""
    return (
        f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__},"
        f" Python {platform.python_version()}"
    )


def is_busy() -> bool:
    """Tell whether other work leaves less than half of the cores free."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
