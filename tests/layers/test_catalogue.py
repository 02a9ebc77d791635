"""Surgeries are found by entry point, also those of other distributions."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import stablekit
import stablekit_layers
from stablekit.errors import AttachError, StablekitWarning, UnknownPluginError
from stablekit_layers import QKNorm, Surgery, apply, available, create
from stablekit_layers.surgery import GROUP

if TYPE_CHECKING:
    from pathlib import Path

POINTS = """
[stablekit.surgery]
their-norm = stablekit_layers:QKNorm
absent = a_module_that_is_not_there:Surgery
"""


@pytest.fixture
def _third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with two surgeries, one of them broken."""
    folder = tmp_path / "theirs-3.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 3.1\n")
    (folder / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_third_party")
def test_a_surgery_of_another_distribution_is_listed() -> None:
    with pytest.warns(StablekitWarning, match="'absent' .* cannot be loaded: No module named"):
        listed = available()
    info = listed["their-norm"]
    assert (info.distribution, info.version) == ("theirs", "3.1")
    assert info.entry_point == "stablekit_layers:QKNorm"
    assert info.summary == (QKNorm.__doc__ or "").split("\n")[0]
    assert info.parameters == {
        key: parameter.default for key, parameter in inspect.signature(QKNorm).parameters.items()
    }
    assert "absent" not in listed
    assert list(listed) == sorted(listed)


@pytest.mark.usefixtures("_third_party")
def test_names_with_arguments_make_it() -> None:
    made = create("their-norm", per="projection")
    assert dict(made.arguments) == {"eps": 1e-6, "per": "projection"}
    with pytest.raises(AttachError, match="qk-norm knows the blocks of"):
        apply(nn.Linear(2, 2), "their-norm:per=projection,eps=1e-5")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'epsilon'.* eps, per, name"):
        apply(nn.Linear(2, 2), "their-norm:epsilon=1")
    with pytest.raises(ValueError, match="surgery 'their-norm': eps must be"):
        create("their-norm", eps=-1)
    with pytest.raises(ValueError, match="expected key=value"):
        apply(nn.Linear(2, 2), "their-norm:projection")


@pytest.mark.usefixtures("_third_party")
def test_an_unknown_name_lists_the_nearest_and_the_known() -> None:
    with pytest.raises(UnknownPluginError, match=r"did you mean 'their-norm'.* Known are: absent"):
        create("thier-norm")


def test_a_surgery_given_as_a_plugin_and_the_reverse_say_what_each_is() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(
        UnknownPluginError, match=r"surgery, not.*layers\.apply\(model, 'qk-norm'\)"
    ):
        stablekit.attach(optimizer, "qk-norm")
    with pytest.raises(
        UnknownPluginError, match=r"plugin, not.*attach\(optimizer, 'z-loss', model"
    ):
        apply(model, "z-loss")
    with pytest.raises(UnknownPluginError, match=r"no installed plugin .* Known are"):
        stablekit.attach(optimizer, "qknorm")


def test_every_surgery_of_the_package_follows_the_protocol() -> None:
    classes = [
        getattr(stablekit_layers, name) for name in stablekit_layers.__all__ if name[0].isupper()
    ]
    surgeries = [cls() for cls in classes if hasattr(cls, "apply_to") and cls is not Surgery]
    assert len({one.name for one in surgeries}) == len(surgeries) >= 2
    for one in surgeries:
        assert isinstance(one, Surgery)
        assert type(one)(**one.arguments).arguments == one.arguments
        names = {other.name for other in surgeries}
        assert one.conflicts <= names


def test_every_entry_point_of_the_package_makes_a_surgery_of_its_name() -> None:
    for name, info in available().items():
        assert create(name).name == name
        assert info.parameters.keys() == inspect.signature(type(create(name))).parameters.keys()
    assert GROUP == "stablekit.surgery"
