"""NormFormer computes what the paper and fairseq compute, on models of three families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from stablekit.errors import AttachError
from stablekit_layers import NormFormer, PeriNorm, apply, no_decay
from tests.layers import contract
from tests.layers.models import FAMILIES, gpt2, llama, logits, qwen3, shake, tokens, train
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from pathlib import Path

ALL = {"head_scale", "attention_norm", "ffn_norm", "residual_scale"}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fairseq, all four": {"placement": "fairseq", "residual_scale": True},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)

_NORMS = {"ln_1": "self_attn_layer_norm", "ln_2": "final_layer_norm"}
_ADDED = {
    "attn.out_norm": "attn_ln",
    "mlp.mid_norm": "ffn_layernorm",
    "attn.head_norm.weight": "c_attn",
    "residual_norm.weight": "w_resid",
}


def only(*parts: str) -> dict[str, Any]:
    return {part: part in parts for part in ALL}


def golden_block(*parts: str, placement: str = "paper", at_start: bool = False) -> Any:  # noqa: ANN401 - a GPT2Block
    """Return a block of GPT-2, which is fairseq's pre-norm layer, with the golden weights."""
    sizes = {"n_embd": 8, "n_head": 2, "n_inner": 16, "n_layer": 1, "activation_function": "gelu"}
    model = gpt2(**sizes).double().eval()
    inputs, _ = golden("normformer")
    state = _plain(inputs)
    if parts:
        apply(model, NormFormer(**only(*parts), placement=placement))
        state |= _extra(inputs)
    block = model.transformer.h[0]
    wanted = block.state_dict()
    kept = {k: v for k, v in state.items() if k in wanted and not (at_start and _is_gain(k))}
    block.load_state_dict({**wanted, **kept})
    return block


def _is_gain(key: str) -> bool:
    return "norm" in key or key.startswith("ln_")


def _plain(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for kind in ("weight", "bias"):
        qkv = [inputs[f"self_attn.{p}_proj.{kind}"] for p in "qkv"]
        state[f"attn.c_attn.{kind}"] = torch.cat(qkv).t()
        state[f"attn.c_proj.{kind}"] = inputs[f"self_attn.out_proj.{kind}"].t()
        state[f"mlp.c_fc.{kind}"] = inputs[f"fc1.{kind}"].t()
        state[f"mlp.c_proj.{kind}"] = inputs[f"fc2.{kind}"].t()
        state |= {f"{ours}.{kind}": inputs[f"{theirs}.{kind}"] for ours, theirs in _NORMS.items()}
    return state


def _extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for ours, theirs in _ADDED.items():
        if theirs in inputs:
            found[ours] = inputs[theirs]
        else:
            found |= {f"{ours}.{k}": inputs[f"{theirs}.{k}"] for k in ("weight", "bias")}
    return found


@pytest.mark.parametrize(
    ("key", "parts", "placement", "at_start"),
    [
        ("fairseq_output", ALL, "fairseq", False),
        ("paper_headscale_output", ALL, "paper", False),
        ("init_output", ALL, "paper", True),
        ("init_output", ALL, "fairseq", True),
        ("prenorm_baseline_output", set(), "paper", True),
        ("prenorm_baseline_output", {"head_scale", "residual_scale"}, "paper", True),
    ],
)
def test_block_equals_the_golden_numbers(
    key: str, parts: set[str], placement: str, at_start: bool
) -> None:
    inputs, outputs = golden("normformer")
    block = golden_block(*parts, placement=placement, at_start=at_start)
    found = block(inputs["x"].transpose(0, 1)).transpose(0, 1)
    expected = torch.tensor(outputs[key], dtype=torch.float64)
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-9


def test_gradient_equals_the_golden_numbers() -> None:
    inputs, outputs = golden("normformer")
    x = inputs["x"].transpose(0, 1).requires_grad_()
    golden_block(*ALL, placement="fairseq")(x).square().sum().backward()
    expected = torch.tensor(outputs["fairseq_grad_x_of_sum_sq"], dtype=torch.float64)
    assert x.grad is not None
    assert ((x.grad.transpose(0, 1) - expected).abs() / (1 + expected.abs())).max() < 1e-9


def test_gated_mlp_is_normed_before_its_last_projection() -> None:
    model = apply(llama(), NormFormer(**only("ffn_norm")))
    shake(model)
    mlp = model.model.layers[1].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    centred = inner - inner.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (normed * mlp.mid_norm.weight + mlp.mid_norm.bias) @ mlp.down_proj.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-5)


@every_family
def test_a_gain_multiplies_what_one_head_adds(family: str) -> None:
    plain, model = FAMILIES[family](), apply(FAMILIES[family](), NormFormer(**only("head_scale")))
    blocks = [m for m in model.modules() if hasattr(m, "head_norm")]
    for attention in blocks:
        attention.head_norm.weight.data[1] = 0.0
    for name, param in plain.named_parameters():  # head 1 is rows 8 to 15 of what W_O is given
        if name.endswith("o_proj.weight"):
            param.data[:, 8:16] = 0.0
        elif name.endswith("attn.c_proj.weight"):
            param.data[8:16] = 0.0
    assert len(blocks) == 2
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


@every_family
@pytest.mark.parametrize("placement", ["paper", "fairseq"])
def test_gains_of_one_change_no_bit_of_training(family: str, placement: str) -> None:
    plain = FAMILIES[family]()
    model = apply(
        FAMILIES[family](), NormFormer(**only("head_scale", "residual_scale"), placement=placement)
    )
    added = set(no_decay(model))
    for name, param in model.named_parameters():
        param.requires_grad_(name not in added)
    for ours, theirs in zip(train(model), train(plain), strict=True):
        assert torch.equal(ours, theirs)
    trained = {k: p for k, p in model.named_parameters() if k not in added}
    for (name, ours), theirs in zip(trained.items(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_attention_adds_does_not_depend_on_the_scale_of_its_projection() -> None:
    model = apply(llama(initializer_range=0.5), NormFormer())
    before = logits(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(4.0)
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_residual_gain_acts_on_the_second_residual_only() -> None:
    model = apply(llama(), NormFormer(**only("residual_scale")))
    layer = model.model.layers[0]
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    rope = model.model.rotary_emb(x, torch.arange(4)[None])
    y = x + layer.self_attn(layer.input_layernorm(x), rope)[0]
    layer.residual_norm.weight.data.uniform_(-2, 2)
    expected = layer.residual_norm.weight * y + layer.mlp(layer.post_attention_layernorm(y))
    assert torch.allclose(layer(x, position_embeddings=rope), expected, atol=1e-6)


@every_variant
@every_family
def test_training_is_the_same_under_checkpointing_and_compilation(
    family: str, variant: str
) -> None:
    model = apply(FAMILIES[family](), NormFormer(**VARIANTS[variant]))
    shake(model)
    contract.copies_have_their_own_modules(model)
    contract.generation_with_a_cache_is_the_same(model)
    contract.checkpointing_changes_nothing(model)
    if family != "qwen3":
        contract.compiling_changes_nothing(apply(FAMILIES[family](), NormFormer()))


@every_variant
@every_family
def test_saved_model_is_loaded_with_it(family: str, variant: str, tmp_path: Path) -> None:
    surgery = NormFormer(**VARIANTS[variant])
    model = apply(FAMILIES[family](), surgery)
    shake(model)
    contract.saved_and_loaded_it_is_the_same(model, surgery, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer_decays_none_of_its_parameters(family: str, tmp_path: Path) -> None:
    model = apply(FAMILIES[family](), NormFormer(residual_scale=True))
    assert len(no_decay(model)) == 2 * 6
    contract.trainer_decays_matrices_only_and_trains(model, tmp_path)


def test_parameters_take_dtype_of_the_weights_beside_them() -> None:
    model = apply(llama().to(torch.bfloat16), NormFormer(residual_scale=True))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


def test_it_refuses_what_contradicts_it() -> None:
    with pytest.raises(AttachError, match="contradict"):
        apply(llama(), NormFormer(), PeriNorm())
    with pytest.raises(AttachError, match="knows the blocks of LLaMA"):
        apply(torch.nn.Linear(2, 2), NormFormer())
    odd = qwen3(num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(AttachError, match="5 slices, which 32"):
        apply(odd, NormFormer(placement="fairseq"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"placement": "after"}, "placement must be one of 'paper', 'fairseq', got 'after'"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0"),
        (only(), "nothing to add"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=words):
        NormFormer(**arguments)
