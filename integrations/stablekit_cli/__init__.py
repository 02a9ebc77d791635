"""Commands: ``stablekit demo``, ``plugins``, ``show``, ``report``, ``watch``, ``replay``."""

from __future__ import annotations

__all__ = ["main"]

EXTRA = {"jinja2", "matplotlib", "rich", "sklearn", "tensorboard", "typer"}


def main() -> None:
    """Run the ``stablekit`` command with the arguments of this process.

    Importing this package loads neither torch nor the command line itself, so that
    ``stablekit --help`` answers at once.
    """
    try:
        from stablekit_cli._app import app

        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise SystemExit(f'stablekit: {error}; run: pip install "stablekit[cli]"') from error
