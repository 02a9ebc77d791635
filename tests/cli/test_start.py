"""The command starts at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "matplotlib", "numpy", "stablekit", "sklearn", "tensorboard")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_is_answered_without_importing_torch() -> None:
    done = _python(
        "import sys, stablekit_cli\n"
        "sys.argv = ['stablekit', '--help']\n"
        "try:\n"
        "    stablekit_cli.main()\n"
        "finally:\n"
        f"    print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )

    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    for command in ("demo", "plugins", "replay", "report", "show", "watch"):
        assert command in done.stdout


def test_missing_extra_is_explained() -> None:
    done = _python(
        "import sys\nsys.modules['typer'] = None\nimport stablekit_cli\nstablekit_cli.main()\n"
    )

    assert done.returncode == 1
    assert 'pip install "stablekit[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
