"""``stablekit plugins`` and ``stablekit show`` say what the catalogue says."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

import stablekit
import stablekit_layers
from stablekit import PluginInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result


POINTS = "[stablekit.surgery]\ntheir-norm = stablekit_layers:QKNorm\n"


@pytest.fixture
def _third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with a surgery."""
    folder = tmp_path / "theirs-3.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 3.1\n")
    (folder / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_third_party")
def test_json_equals_the_catalogues(run: Callable[..., Result]) -> None:
    known: dict[str, Any] = {**stablekit.available(), **stablekit_layers.available()}
    listed = {one["name"]: one for one in json.loads(run("plugins", "--json").stdout)}

    assert list(listed) == list(known)
    for name, info in known.items():
        for field in fields(info):
            if field.name not in {"parameters", "hooks"}:
                assert listed[name][field.name] == getattr(info, field.name)
        if isinstance(info, PluginInfo):
            assert listed[name]["hooks"] == list(info.hooks)
        assert listed[name]["kind"] == ("plugin" if name in stablekit.available() else "surgery")
        assert list(listed[name]["parameters"]) == list(info.parameters)


def test_json_names_the_required_parameters(run: Callable[..., Result]) -> None:
    listed = {one["name"]: one for one in json.loads(run("plugins", "--json").stdout)}

    for name, info in stablekit.available().items():
        empty = inspect.Parameter.empty
        assert listed[name]["required"] == [k for k, v in info.parameters.items() if v is empty]
    assert listed["clip-value"]["required"] == ["limit"]


@pytest.mark.usefixtures("_third_party")
def test_table_has_every_plugin_and_every_surgery(run: Callable[..., Result]) -> None:
    printed = run("plugins").stdout

    assert "theirs 3.1" in printed
    known: dict[str, Any] = {**stablekit.available(), **stablekit_layers.available()}
    for name, info in known.items():
        assert name in printed
        assert info.version in printed


def test_show_prints_the_constructor_with_its_defaults(run: Callable[..., Result]) -> None:
    done = run("show", "zclip")

    assert done.exit_code == 0
    constructor = next(line for line in done.stdout.splitlines() if "ZClip(" in line)
    for key, default in stablekit.available()["zclip"].parameters.items():
        assert f"{key}={default!r}" in constructor


def test_show_prints_paper_hooks_and_cost(run: Callable[..., Result]) -> None:
    printed = run("show", "zclip").stdout

    assert "2504.02507" in printed
    assert "Hooks\n  transform_gradients" in printed
    assert "Cost of a step\n  one read of the gradients" in printed


@pytest.mark.usefixtures("_third_party")
def test_show_prints_how_a_surgery_is_made(run: Callable[..., Result]) -> None:
    printed = run("show", "their-norm").stdout

    assert "QKNorm(eps=1e-06, per='head', name=None)" in printed
    assert "stablekit_layers.apply(model, 'their-norm'), before the optimizer" in printed
    assert "Folds into the plain model\n  no" in printed
    assert "Not together with\n  hybridnorm, hybridnorm-star" in printed
    assert "2309.14322" in printed
    assert "Hooks" not in printed


def test_every_plugin_and_surgery_can_be_shown(run: Callable[..., Result]) -> None:
    for name in (*stablekit.available(), *stablekit_layers.available()):
        assert run("show", name).exit_code == 0, name


def test_unknown_name_exits_2_with_the_nearest_and_the_known(run: Callable[..., Result]) -> None:
    done = run("show", "zclp")

    assert done.exit_code == 2
    assert "did you mean zclip?" in done.stderr
    assert "nonfinite-guard" in done.stderr
    assert "Traceback" not in done.stderr
