"""``--arms``: names, keywords, chains, and clear errors."""

from __future__ import annotations

import pytest

from stablekit_cli.demo._arms import Arm, ArmError, parse_arms

PLUGINS = ("adagc", "autoclip", "global-norm", "nonfinite-guard", "recommended", "zclip")


def test_commas_within_keywords_do_not_separate_arms() -> None:
    arms = parse_arms("none,zclip:z_thresh=3.0,warmup_steps=50,adagc", PLUGINS)

    assert [arm.label for arm in arms] == ["none", "zclip:z_thresh=3.0,warmup_steps=50", "adagc"]


def test_plus_joins_a_chain_but_not_an_exponent() -> None:
    (arm,) = parse_arms("global-norm:max_norm=1e+1+autoclip:percentile=50", PLUGINS)

    assert arm.chain == ("nonfinite-guard", "global-norm:max_norm=1e+1", "autoclip:percentile=50")


@pytest.mark.parametrize("text", ["zclip+nonfinite-guard", "recommended"])
def test_guard_is_not_added_twice(text: str) -> None:
    assert parse_arms(text, PLUGINS)[0].chain == tuple(text.split("+"))


def test_guard_can_be_left_out() -> None:
    assert parse_arms("zclip", PLUGINS, guard=False) == [Arm("zclip", ("zclip",))]


def test_slug_is_a_folder_name() -> None:
    assert Arm("zclip:a=1,b=2/3").slug == "zclip-a=1-b=2-3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("autclip", r"unknown arm 'autclip'; did you mean autoclip\? Known: none, clip, adagc"),
        ("zclip+none", r"unknown arm 'none' in 'zclip\+none'"),
        ("zclip,zclip", "twice"),
        (" , ", "empty"),
    ],
)
def test_bad_arm_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(ArmError, match=message):
        parse_arms(text, PLUGINS)
