"""Weights are standardised as DeepMind's and timm's code does it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stablekit.errors import AttachError
from stablekit_layers import ScaledWeightStandardization, apply, no_decay
from stablekit_layers.scaled_ws import GAMMAS, StandardizedWeight, standardize
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "lm_head"


def near(found: Tensor, expected: Any) -> bool:  # noqa: ANN401 - nested lists
    wanted = torch.tensor(expected, dtype=torch.float64)
    return bool(((found - wanted).abs() / (1 + wanted.abs())).max() < 1e-9)


def layer_of(weight: Tensor, gain: Tensor | None, **settings: Any) -> Any:  # noqa: ANN401
    """Return a convolution or a linear layer with this weight, standardised."""
    out, width, *kernel = weight.shape
    layer: Any = nn.Conv2d(width, out, kernel[0]) if kernel else nn.Linear(width, out)
    layer = layer.double()
    layer.weight.data = weight.clone()
    apply(nn.Sequential(layer), ScaledWeightStandardization(**settings))
    if gain is not None:
        layer.parametrizations.weight[0].row_norm.data = gain.clone()
    return layer


def norms(weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return found


def test_convolution_equals_deepminds_numbers() -> None:
    inputs, outputs = golden("scaled_ws")
    layer = layer_of(inputs["w_hwio"].permute(3, 2, 0, 1), inputs["gain"])
    assert near(layer.weight[0].permute(1, 2, 0), outputs["dm_hwio_out_channel0"])
    assert near(norms(layer.weight), outputs["dm_fro_per_channel"])


def test_convolution_equals_timms_numbers() -> None:
    inputs, outputs = golden("scaled_ws")
    weight = inputs["w_hwio"].permute(3, 2, 0, 1)
    layer = layer_of(weight, inputs["gain"], form="timm")
    assert near(layer.weight[0], outputs["timm_out_channel0_ihw"])
    assert near(norms(layer.weight), outputs["timm_fro_per_channel"])


def test_linear_layer_equals_the_golden_numbers_above_and_below_the_floor() -> None:
    inputs, outputs = golden("scaled_ws")
    weight, gain = inputs["w_linear_oi"], inputs["gain_linear"]
    assert near(layer_of(weight, gain).weight, outputs["linear"])
    below = outputs["linear_when_var_below_floor_w_times_1e_3"]
    assert near(layer_of(1e-3 * weight, gain).weight, below)


def test_gains_of_activations_are_the_golden_numbers() -> None:
    _, outputs = golden("scaled_ws")
    assert pytest.approx(outputs["gammas"], rel=1e-9) == GAMMAS


@pytest.mark.parametrize("activation", GAMMAS)
def test_gain_of_an_activation_makes_its_variance_one(activation: str) -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    out = GAMMAS[activation] * getattr(torch.nn.functional, activation)(x)
    assert out.var().item() == pytest.approx(1.0, abs=0.01)


def test_activation_multiplies_the_weights() -> None:
    plain = nn.Linear(6, 3)
    weight = plain.weight.detach().clone()
    apply(nn.Sequential(plain), ScaledWeightStandardization(activation="relu"))
    assert torch.allclose(plain.weight, 1.7139588594436646 * standardize(weight))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_rows_have_mean_zero_and_norm_one_in_groups_too(kind: Any) -> None:  # noqa: ANN401
    layer = kind(4, 6, 3, groups=2)
    apply(nn.Sequential(layer), ScaledWeightStandardization())
    assert layer.weight.flatten(1).mean(1).abs().max() < 1e-6
    assert torch.allclose(norms(layer.weight), torch.ones(6), atol=1e-5)


def test_scale_and_mean_of_a_weight_do_not_matter() -> None:
    layer: Any = nn.Linear(8, 4)
    apply(nn.Sequential(layer), ScaledWeightStandardization(eps=1e-12))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3).add_(0.5)
    assert torch.allclose(layer.weight, before, atol=1e-5)


def test_gradient_reaches_weight_and_gain_as_by_hand() -> None:
    layer: Any = nn.Linear(5, 3).double()
    apply(nn.Sequential(layer), ScaledWeightStandardization())
    original = layer.parametrizations.weight.original
    v = original.detach().clone().requires_grad_()
    g = torch.ones(3, dtype=torch.float64, requires_grad=True)
    centred = v - v.mean(1, keepdim=True)
    made = g[:, None] * centred / norms(centred)[:, None]
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((x @ made.T + layer.bias).pow(3).sum(), (v, g))
    layer(x).pow(3).sum().backward()
    assert torch.allclose(original.grad, wanted[0])
    assert torch.allclose(layer.parametrizations.weight[0].row_norm.grad, wanted[1])


def test_half_precision_is_standardised_in_single() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = standardize(weight.bfloat16().float()).bfloat16()
    assert torch.equal(standardize(weight.bfloat16()), expected)


def test_without_a_gain_there_is_no_new_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    apply(model, ScaledWeightStandardization(gain=False))
    assert [p.shape for p in model.parameters()] == [(3,), (3, 4)]
    assert no_decay(model) == []


def test_include_names_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Linear(4, 2))
    apply(model, ScaledWeightStandardization(include="1.*"))
    found = [name for name, m in model.named_modules() if parametrize.is_parametrized(m, "weight")]
    assert found == ["1.0"]


def test_it_refuses_weights_that_are_shared_or_computed_already() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(AttachError, match=r"0\.weight and 1\.weight are one weight"):
        apply(tied, ScaledWeightStandardization())
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(AttachError, match="computed from another already"):
        apply(spectral, ScaledWeightStandardization())


def test_it_refuses_layers_that_it_does_not_know() -> None:
    model = nn.Sequential(nn.Embedding(3, 2))
    with pytest.raises(AttachError, match="no convolution and no linear layer"):
        apply(model, ScaledWeightStandardization())
    with pytest.raises(AttachError, match=r"linear layers: 0 \(Embedding\)"):
        apply(model, ScaledWeightStandardization(include="0"))
    with pytest.raises(AttachError, match="matches no module"):
        apply(model, ScaledWeightStandardization(include="body.*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "paper"}, "form must be one of 'deepmind', 'timm'"),
        ({"activation": "elu"}, "activation must be one of 'relu', 'gelu', 'silu', 'tanh'"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=words):
        ScaledWeightStandardization(**arguments)


def test_transposed_weight_is_standardised_by_output() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = standardize(weight, transposed=True)
    assert torch.allclose(found, standardize(weight.T).T)
    assert found.is_contiguous()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_models_of_transformers_train_save_and_load(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.layers import contract
    from tests.layers.models import FAMILIES, shake

    surgery = ScaledWeightStandardization()
    model = apply(FAMILIES[family](), surgery)
    shake(model)
    changed = [m for m in model.modules() if isinstance(m, StandardizedWeight)]
    assert len(changed) == len(no_decay(model)) == 2 * (4 if family == "gpt2" else 7)
    assert not parametrize.is_parametrized(model.get_submodule(HEAD))
    contract.copies_have_their_own_modules(model)
    contract.generation_with_a_cache_is_the_same(model)
    contract.checkpointing_changes_nothing(model)
    contract.saved_and_loaded_it_is_the_same(model, surgery, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer_decays_no_gain_and_compilation_changes_nothing(
    family: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from tests.layers import contract
    from tests.layers.models import FAMILIES

    model = apply(FAMILIES[family](), ScaledWeightStandardization())
    contract.compiling_changes_nothing(copy.deepcopy(model))
    contract.trainer_decays_matrices_only_and_trains(model, tmp_path)
