"""QKNorm computes what Qwen3 and OLMo 2 compute, on models of other families."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from stablekit.errors import AttachError
from stablekit_layers import QKNorm, apply
from stablekit_layers.norms import RMSNorm, rms_normalise
from tests.layers.models import gpt2, llama, logits, qwen3, shake, tokens, train, transformers
from tests.updates.goldens import golden

PER = ["head", "projection"]


def test_norm_equals_the_golden_numbers() -> None:
    inputs, outputs = golden("misc")
    q, gain = inputs["q"], inputs["gain"]
    expected = torch.tensor(outputs["rms_qk_norm"], dtype=torch.float64)
    assert torch.allclose(rms_normalise(q, gain, 1e-6), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(16, eps=1e-6).to(dtype)
    ours = RMSNorm(16, eps=1e-6, dtype=dtype)
    shake(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_llama_with_it_is_qwen3_bit_for_bit() -> None:
    reference = qwen3()
    shake(reference)
    model = apply(llama(head_dim=8, rms_norm_eps=reference.config.rms_norm_eps), QKNorm(1e-6))
    model.load_state_dict(reference.state_dict())  # the same names

    assert torch.equal(logits(model), logits(reference))
    for ours, theirs in zip(train(model), train(reference), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_per_projection_it_is_the_norm_of_olmo2() -> None:
    config = transformers.Olmo2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    reference = transformers.models.olmo2.modeling_olmo2.Olmo2Attention(config, 0)
    model = apply(llama(attn_implementation="eager"), QKNorm(1e-6, per="projection"))
    attention = model.model.layers[0].self_attn
    shake(reference)
    attention.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    rope = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)

    assert attention.q_norm.weight.shape == (32,)
    assert attention.k_norm.weight.shape == (16,)
    assert torch.equal(attention(x, rope, None)[0], reference(x, rope, None)[0])


@pytest.mark.parametrize("per", PER)
def test_gpt2_normalises_queries_and_keys_and_leaves_values(per: str) -> None:
    model = apply(gpt2(), QKNorm(1e-6, per=per))
    shake(model)
    attention = model.transformer.h[0].attn
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    plain = x @ attention.c_attn.weight + attention.c_attn.bias
    expected = []
    norms = (attention.q_norm, attention.k_norm, None)
    for part, norm in zip(plain.split(32, dim=-1), norms, strict=True):
        expected.append(part if norm is None else _naive(part, norm, per))
    assert torch.allclose(attention.c_attn(x), torch.cat(expected, -1), atol=1e-6)


def _naive(x: Tensor, norm: Any, per: str) -> Tensor:  # noqa: ANN401
    width = 8 if per == "head" else 32
    assert norm.weight.shape == (width,)
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for start in range(0, x.shape[2], width):
                part = x[row, token, start : start + width].double()
                rms = math.sqrt(sum(v * v for v in part.tolist()) / width + 1e-6)
                out[row, token, start : start + width] = part / rms * norm.weight
    return out


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("per", PER)
def test_scale_of_the_projections_does_not_matter(make: Any, per: str) -> None:  # noqa: ANN401
    model = apply(make(initializer_range=0.5), QKNorm(per=per))
    before = logits(model)
    with torch.no_grad():
        for query in _queries_and_keys(model):
            query.mul_(8.0)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradient_of_the_projections_is_orthogonal_to_each_head(make: Any) -> None:  # noqa: ANN401
    model = apply(make(initializer_range=0.5), QKNorm(1e-12))
    model(input_ids=tokens(), labels=tokens()).loss.backward()

    weights = _queries_and_keys(model)
    grads = _queries_and_keys(model, of_gradients=True)
    for weight, grad in zip(weights, grads, strict=True):
        for w, g in zip(weight.detach().split(8), grad.split(8), strict=True):
            cosine = (w * g).sum() / (w.norm() * g.norm())
            assert abs(cosine) < 1e-4
            assert g.norm() > 0


def _queries_and_keys(model: nn.Module, *, of_gradients: bool = False) -> list[Tensor]:
    """Return the weights, or their gradients, as ``[out, in]``."""

    def read(param: Any) -> Tensor:  # noqa: ANN401
        found: Tensor = param.grad if of_gradients else param
        return found

    found = []
    module: Any
    for module in model.modules():
        if hasattr(module, "c_attn"):
            found += [read(module.c_attn.weight)[:, :32].T, read(module.c_attn.weight)[:, 32:64].T]
        elif hasattr(module, "q_proj"):
            found += [read(module.q_proj.weight), read(module.k_proj.weight)]
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_are_bounded_by_the_gains(make: Any) -> None:  # noqa: ANN401
    model = apply(make(initializer_range=1.0, attn_implementation="eager"), QKNorm())
    seen: dict[str, Tensor] = {}
    for name in ("q_norm", "k_norm"):
        norm = next(m for n, m in model.named_modules() if n.endswith(name))
        norm.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    logits(model)
    q, k = (seen[name].reshape(-1, 8) for name in ("q_norm", "k_norm"))

    assert (q @ k.T).abs().max() / math.sqrt(8) <= math.sqrt(8) * (1 + 1e-5)
    assert torch.allclose(q.norm(dim=-1), torch.tensor(math.sqrt(8.0)), atol=1e-3)


def test_queries_of_equal_norm_are_left_as_they_are_by_a_gain_of_that_size() -> None:
    norm = RMSNorm(4, eps=1e-12)
    x = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    with torch.no_grad():
        norm.weight.fill_(2.5)  # the root mean square of both
    assert torch.allclose(norm(x), x)


@pytest.mark.parametrize("family", ["Qwen3", "Olmo2", "Gemma3Text"])
def test_families_that_have_it_are_refused(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=61, pad_token_id=0
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = set(model.state_dict())
    with pytest.raises(AttachError, match=r"already|by themselves"):
        apply(model, QKNorm())
    assert set(model.state_dict()) == names


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got 0"):
        QKNorm(0)
    with pytest.raises(ValueError, match="per must be one of 'head', 'projection', got 'layer'"):
        QKNorm(per="layer")
