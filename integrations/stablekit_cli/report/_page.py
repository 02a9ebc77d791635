"""The HTML file: template, styles and scripts put together, with nothing left to be fetched."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stablekit_cli.report._text import number, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["page"]

STYLES = ("uPlot.min.css", "report.css")
SCRIPTS = ("uPlot.iife.min.js", "base.js", "lines.js", "heat.js", "page.js")


def page(content: Mapping[str, Any], data: str) -> str:
    """Return the page.

    Args:
        content: the template's variables; every text among them is escaped.
        data: JSON for the charts that may stand in a script element as it is.
    """
    styles, scripts = [_asset(name) for name in STYLES], [_asset(name) for name in SCRIPTS]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_asset("report.html.jinja"))
    return template.render(
        **content,
        data=Markup(data),
        styles=[Markup(style) for style in styles],
        scripts=[Markup(script) for script in scripts],
        policy=_policy(styles, scripts),
        number=number,
        percent=percent,
    )


def _policy(styles: Iterable[str], scripts: Iterable[str]) -> str:
    """Allow the browser these styles and scripts and nothing else, from nowhere else."""
    return (
        f"default-src 'none'; style-src {_hashes(styles)}; script-src {_hashes(scripts)};"
        " base-uri 'none'; form-action 'none'"
    )


def _hashes(texts: Iterable[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _asset(name: str) -> str:
    return files("stablekit_cli.report").joinpath("assets", name).read_text("utf-8")
