"""PeriNorm computes the golden numbers of a reference block and bounds what blocks add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from stablekit.errors import AttachError
from stablekit_layers import PeriNorm, apply
from tests.layers.models import FAMILIES, gpt2, llama, logits, shake, tokens, train, transformers
from tests.updates.goldens import golden

OUT = ("attention_out_norm", "mlp_out_norm")


def test_block_equals_the_golden_numbers() -> None:
    inputs, outputs = golden("perinorm")
    model = llama(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    apply(model, PeriNorm(1e-5, embedding=False))
    block = model.model.layers[0]
    block.load_state_dict(_renamed({key: value.float() for key, value in inputs.items()}))
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(inputs_embeds=inputs["x"].float())

    expected = torch.tensor(outputs["gate_ones"])
    assert ((seen[0] - expected).abs() / (1 + expected.abs())).max() < 3e-5


def _renamed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "pre_attention_norm",
        "attention_out_norm": "post_attention_norm",
        "post_attention_layernorm": "pre_feed_forward_norm",
        "mlp_out_norm": "post_feed_forward_norm",
    }
    found = {f"{ours}.weight": inputs[f"{theirs}.weight"] for ours, theirs in names.items()}
    for key in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        found[key] = _halves(found[key], head_dim=4)
    return found


def _halves(weight: Tensor, *, head_dim: int) -> Tensor:
    """Reorder rows from pairs of neighbours, which the reference rotates, to pairs of halves."""
    heads = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_update_has_the_root_mean_square_of_the_gain(family: str) -> None:
    model = apply(FAMILIES[family](initializer_range=0.5), PeriNorm(1e-12))
    seen = _outputs(model, OUT)
    logits(model)

    assert len(seen) == 4
    for update in seen:
        assert torch.allclose(update.pow(2).mean(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_of_the_last_projections_does_not_matter(family: str) -> None:
    model = apply(FAMILIES[family](initializer_range=0.5), PeriNorm(1e-12))
    before = logits(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(key in name for key in ("o_proj", "down_proj", "c_proj")):
                param.mul_(8.0)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_of_zero_leave_the_embedding_alone(family: str) -> None:
    model = apply(FAMILIES[family](), PeriNorm(embedding=False))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(tuple(f"{key}.weight" for key in OUT)):
                param.zero_()
    states = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_enter_the_first_block_normalised_also_when_given_as_vectors(
    family: str,
) -> None:
    model = apply(FAMILIES[family](), PeriNorm(1e-12))
    blocks: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    seen: list[Tensor] = []
    first_norm = next(blocks[0].children()) if family == "gpt2" else blocks[0].input_layernorm
    first_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    by_ids = logits(model)
    vectors = model.get_input_embeddings()(tokens())
    by_vectors = model(inputs_embeds=vectors).logits

    assert torch.allclose(seen[0].pow(2).mean(-1), torch.ones(()), atol=1e-4)
    assert torch.equal(by_ids, by_vectors)


def test_variance_of_the_stream_grows_linearly_with_depth() -> None:
    model = apply(llama(num_hidden_layers=6, initializer_range=0.3, hidden_size=64), PeriNorm())
    states = model(input_ids=tokens(rows=8), output_hidden_states=True).hidden_states[1:-1]
    # 1 of the embedding and about 1 for each of the two sublayers of a block.
    variances = [float(state.detach().pow(2).mean()) for state in states]
    for depth, variance in enumerate(variances, 1):
        assert 0.6 < variance / (1 + 2 * depth) < 1.5


def test_dropout_of_gpt2_comes_after_the_norm() -> None:
    model = apply(gpt2(resid_pdrop=0.5, embd_pdrop=0.5, initializer_range=0.3), PeriNorm())
    model.train()
    seen = _outputs(model, ("resid_dropout", "drop"))
    torch.manual_seed(0)
    model(input_ids=tokens())
    for out in seen:
        dropped = (out == 0).float().mean()
        assert 0.3 < dropped < 0.7
        kept = out[out != 0] / 2  # dropout divides by what it keeps
        assert 0.5 < kept.pow(2).mean() < 1.5


def _outputs(model: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
    return seen


def test_paddings_of_zeros_stay_finite() -> None:
    model = apply(llama(), PeriNorm())
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert train(model, 1)[0].isfinite()
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text", "Olmo2"])
def test_families_that_have_such_norms_are_refused(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=61, pad_token_id=0
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(AttachError, match="by themselves"):
        apply(model, PeriNorm())


def test_without_the_embedding_norm_weights_of_it_are_left_over() -> None:
    whole, part = apply(llama(), PeriNorm()), apply(llama(), PeriNorm(embedding=False))
    assert set(whole.state_dict()) - set(part.state_dict()) == {"model.embedding_norm.weight"}


def test_it_goes_with_the_norm_of_queries_and_keys() -> None:
    from stablekit_layers import QKNorm

    model = apply(llama(), QKNorm(), PeriNorm())
    shake(model)
    assert [one["name"] for one in model.config.stablekit_surgery] == ["qk-norm", "peri-ln"]
    assert all(loss.isfinite() for loss in train(model))
