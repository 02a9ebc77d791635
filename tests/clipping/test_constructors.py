"""A bad argument is refused when it is given, with its name, its value and what is allowed."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import stablekit
from stablekit_clipping import AGC, AdaGC, AutoClip, ClipValue, GlobalNorm, QuantileClip, ZClip
from stablekit_recovery import NonFiniteGuard

if TYPE_CHECKING:
    from collections.abc import Callable

NOT_NUMBERS: list[Any] = ["1", True, [1.0], torch.tensor(1.0), 1j]
POSITIVE: list[Any] = [0, -1.0, math.nan, math.inf, -math.inf, 10**400, *NOT_NUMBERS, None]
FRACTION: list[Any] = [-0.1, 1.1, math.nan, math.inf, *NOT_NUMBERS, None]
COUNT: list[Any] = [-1, 1.0, math.nan, 2.5, "3", True, [3], torch.tensor(3)]
WORD: list[Any] = ["", "zScore", None, 3, True, ["raw"]]
FLAG: list[Any] = ["no", "False", 0, 1, None, 0.0]
NAME: list[Any] = ["", 3, True, ["zclip"], b"zclip"]

BAD: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (GlobalNorm, "max_norm", POSITIVE),
    (GlobalNorm, "norm_type", [1.0, 0, -2, math.nan, -math.inf, *NOT_NUMBERS, None]),
    (ClipValue, "limit", POSITIVE),
    (AutoClip, "percentile", [*FRACTION[:1], 100.1, *FRACTION[2:]]),
    (AutoClip, "history", [0, 2**40, *COUNT]),
    (QuantileClip, "quantile", FRACTION),
    (QuantileClip, "history", [0, 2**40, None, *COUNT]),
    (QuantileClip, "per_tensor", FLAG),
    (ZClip, "z_thresh", POSITIVE),
    (ZClip, "alpha", [0.0, 1.0, *FRACTION]),
    (ZClip, "max_grad_norm", POSITIVE[:-1]),
    (ZClip, "eps", [-1e-9, *POSITIVE[2:]]),
    (ZClip, "warmup_steps", [0, None, *COUNT]),
    (ZClip, "mode", WORD),
    (ZClip, "clip_option", ["zscore", *WORD]),
    (ZClip, "clip_factor", POSITIVE),
    (ZClip, "skip_update_on_spike", FLAG),
    (AdaGC, "lambda_rel", [1.0, 0.5, *POSITIVE]),
    (AdaGC, "beta", [0, 1, *FRACTION]),
    (AdaGC, "lambda_abs", POSITIVE),
    (AdaGC, "warmup_steps", [None, *COUNT]),
    (AdaGC, "warmup_norms", WORD),
    (AGC, "clipping", POSITIVE),
    (AGC, "eps", POSITIVE),
    (NonFiniteGuard, "max_consecutive", [0, None, *COUNT]),
]
PLUGINS: list[Callable[..., Any]] = [
    GlobalNorm,
    lambda **name: ClipValue(1.0, **name),
    AutoClip,
    QuantileClip,
    ZClip,
    AdaGC,
    AGC,
    NonFiniteGuard,
]
CASES = [(make, argument, value) for make, argument, values in BAD for value in values]
CASES += [(make, "name", value) for make in PLUGINS for value in NAME]


@pytest.mark.parametrize(("make", "argument", "value"), CASES, ids=lambda part: f"{part!r:.12}")
def test_bad_value_is_refused_in_words(
    make: Callable[..., Any], argument: str, value: object
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make(**{argument: value})
    message = str(caught.value)
    assert message.startswith(f"{argument} must be ")
    assert message.endswith(f", got {value!r}")
    allowed = message[len(argument) + len(" must be ") : -len(f", got {value!r}")]
    assert allowed


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_any_real_number_is_taken(value: float) -> None:
    assert GlobalNorm(value).max_norm == 0.5
    assert ZClip(alpha=value).alpha == 0.5


def test_numpy_integers_are_integers() -> None:
    assert ZClip(warmup_steps=np.int64(7)).warmup_steps == 7  # type: ignore[arg-type]  # numpy


def optimizer() -> torch.optim.Optimizer:
    model = torch.nn.Linear(2, 2)
    return torch.optim.SGD(model.named_parameters(), lr=0.1)


def test_a_string_names_a_plugin_and_its_arguments() -> None:
    session = stablekit.attach(
        optimizer(),
        "zclip:z_thresh=3.0,warmup_steps=50,max_grad_norm=none,mode=percentile",
        "adagc:warmup_norms=clipped",
    )
    zclip = session.plugins["zclip"]
    assert isinstance(zclip, ZClip)
    assert (zclip.z_thresh, zclip.warmup_steps, zclip.max_grad_norm) == (3.0, 50, None)
    assert zclip.mode == "percentile"
    assert session.plugins["adagc"].warmup_norms == "clipped"  # type: ignore[attr-defined]  # AdaGC


def test_a_mapping_names_a_plugin_its_arguments_and_its_parameters() -> None:
    attached = optimizer()
    spec = {"zclip": {"z_thresh": 3.0, "exclude": "*bias", "max_grad_norm": 0.1}}
    session = stablekit.attach(attached, spec)
    for param in attached.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    attached.step()
    weight, bias = attached.param_groups[0]["params"]
    assert session.plugins["zclip"].z_thresh == 3.0  # type: ignore[attr-defined]  # ZClip
    assert weight.grad.norm() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(bias.grad, torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zclip:z_thresh=-1", "z_thresh must be a finite number above 0, got -1"),
        ("zclip:skip_update_on_spike=no", "skip_update_on_spike must be True or False, got 'no'"),
        ("quantile-clip:per_tensor=1", "per_tensor must be True or False, got 1"),
        ({"zclip": {"mode": "median"}}, "mode must be one of 'zscore', 'percentile', got 'median'"),
        ("zclip:z_tresh=3", "unexpected keyword argument 'z_tresh'"),
        ("clip-value", "missing a required argument: 'limit'"),
        ("zclip:z_thresh", "expected key=value"),
    ],
)
def test_a_bad_specification_is_refused_in_words(spec: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        stablekit.attach(optimizer(), spec)
    assert words in str(caught.value)
