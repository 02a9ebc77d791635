"""HybridNorm and HybridNorm* compute what the authors' blocks compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")

from stablekit.errors import AttachError
from stablekit_layers import HybridNorm, HybridNormStar, NormFormer, QKNorm, apply, no_decay
from tests.layers import contract
from tests.layers.models import (
    FAMILIES,
    gpt2,
    llama,
    logits,
    mistral,
    qwen2,
    qwen3,
    shake,
    tokens,
    train,
    transformers,
)
from tests.updates.goldens import golden

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SURGERIES = [HybridNorm, HybridNormStar]
every_surgery = pytest.mark.parametrize("surgery", SURGERIES)
every_family = pytest.mark.parametrize("family", FAMILIES)

_GOLDEN_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


def golden_state() -> dict[str, Tensor]:
    """Return the golden weights under LLaMA's names."""
    inputs, _ = golden("hybridnorm")
    state = {f"self_attn.{p}_norm.weight": inputs[f"{p}_norm.weight"] for p in "qkv"}
    q, k, v = inputs["att_proj.weight"].split((16, 8, 8))
    state |= {"self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k}
    up, gate = inputs["ff_proj.weight"].chunk(2)
    return state | {
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": inputs["attn_out.weight"],
        "mlp.up_proj.weight": up,
        "mlp.gate_proj.weight": gate,
        "mlp.down_proj.weight": inputs["ff_out.weight"],
        "post_attention_layernorm.weight": inputs["ff_norm.weight"],
        "input_layernorm.weight": inputs["attn_norm.weight"],
    }


@pytest.mark.parametrize("make", [llama, qwen3])
@pytest.mark.parametrize(("star", "key"), [(False, "block"), (True, "star_block0")])
def test_block_equals_the_golden_numbers(make: Any, star: bool, key: str) -> None:  # noqa: ANN401
    inputs, outputs = golden("hybridnorm")
    surgery = HybridNormStar(1e-5) if star else HybridNorm(1e-5)
    model = apply(make(**_GOLDEN_SIZES), surgery).double()
    block = model.model.layers[0]
    state = golden_state()
    if not star:
        del state["input_layernorm.weight"]
    block.load_state_dict(state)  # all of them and no others
    rope = model.model.rotary_emb(inputs["x"], torch.arange(5)[None])
    found = block(inputs["x"], position_embeddings=rope)
    expected = torch.tensor(outputs[key], dtype=torch.float64)
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 3e-5


def test_gpt2_block_equals_a_plain_transcription() -> None:
    model = apply(gpt2(), HybridNorm(1e-5)).double()
    shake(model)
    block = model.transformer.h[1]
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rms(part: Tensor, norm: Any) -> Tensor:  # noqa: ANN401
        heads = part.view(2, 6, 4, 8)
        found: Tensor = norm.weight * heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return found

    attention = block.attn
    parts = (x @ attention.c_attn.weight + attention.c_attn.bias).split(32, -1)
    norms = (attention.q_norm, attention.k_norm, attention.v_norm)
    q, k, v = (rms(part, norm).transpose(1, 2) for part, norm in zip(parts, norms, strict=True))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    y = x + heads @ attention.c_proj.weight + attention.c_proj.bias
    n = torch.nn.functional.layer_norm(y, (32,), block.ln_2.weight, block.ln_2.bias, 1e-5)
    assert torch.allclose(block(x), n + block.mlp(n), atol=1e-12)


@every_family
def test_star_differs_in_the_first_block_only(family: str) -> None:
    plain = apply(FAMILIES[family](), HybridNorm())
    star = apply(FAMILIES[family](), HybridNormStar())
    first = "model.layers.0.input_layernorm", "transformer.h.0.ln_1"
    extra = set(star.state_dict()) - set(plain.state_dict())
    assert extra
    assert all(key.startswith(first) for key in extra)
    blocks = [
        [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "GPT2Block"))]
        for model in (plain, star)
    ]
    assert type(blocks[0][1]) is type(blocks[1][1])
    assert type(blocks[0][0]) is type(blocks[0][1])
    assert type(blocks[1][0]) is not type(blocks[1][1])


def test_qwen3_keeps_its_own_norms_of_queries_and_keys() -> None:
    model = qwen3()
    own = model.model.layers[0].self_attn.q_norm
    apply(model, HybridNorm())
    assert model.model.layers[0].self_attn.q_norm is own
    assert len(no_decay(model)) == 2  # v_norm of two layers


@every_surgery
@every_family
def test_scale_of_queries_keys_and_values_does_not_matter(surgery: Any, family: str) -> None:  # noqa: ANN401
    model = apply(FAMILIES[family](initializer_range=0.5), surgery(1e-9))
    before = logits(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_attn." in name or any(f"{p}_proj." in name for p in "qkv"):
                param.mul_(8.0)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4)


def test_residual_of_the_mlp_is_not_rounded_by_a_large_stream() -> None:
    model = apply(llama(), HybridNorm()).to(torch.bfloat16)
    block = model.model.layers[0]
    x = 200 * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = model.model.rotary_emb(x, torch.arange(4)[None])
    y = x + block.self_attn(x, rope)[0]
    n = block.post_attention_layernorm(y)
    expected = n.double() + block.mlp(n).double()
    assert (block(x, position_embeddings=rope).double() - expected).abs().max() < 0.02


@every_surgery
@every_family
def test_hidden_states_are_recorded_and_blocks_keep_their_names(surgery: Any, family: str) -> None:  # noqa: ANN401
    model, plain = apply(FAMILIES[family](), surgery()), FAMILIES[family]()
    found = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert len(found) == 3
    kinds = [{type(m).__name__ for m in one.modules()} for one in (model, plain)]
    assert kinds[1] <= kinds[0]


@every_surgery
@every_family
def test_training_is_the_same_under_checkpointing_and_compilation(
    surgery: Any,  # noqa: ANN401
    family: str,
) -> None:
    model = apply(FAMILIES[family](), surgery())
    shake(model)
    contract.copies_have_their_own_modules(model)
    contract.generation_with_a_cache_is_the_same(model)
    contract.checkpointing_changes_nothing(model)
    if surgery is HybridNormStar:
        contract.compiling_changes_nothing(apply(FAMILIES[family](), surgery()))


@every_family
def test_model_can_be_pickled(family: str, tmp_path: Path) -> None:
    model = apply(FAMILIES[family](), HybridNorm())
    shake(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("surgery", [HybridNormStar(), NormFormer(residual_scale=True)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharded_by_fsdp2_it_trains_the_same(family: str, surgery: Any) -> None:  # noqa: ANN401
    one, other = (apply(FAMILIES[family](), surgery) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    blocks: Any = next(m for m in other.modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(other, mesh=mesh)
    for plain, sharded in zip(train(one), train(other), strict=True):
        assert torch.allclose(plain, sharded, atol=1e-6)


@pytest.mark.parametrize("make", [mistral, qwen2])
@pytest.mark.parametrize("surgery", [HybridNormStar(), NormFormer(residual_scale=True)])
def test_other_families_train_and_generate_alike(make: Any, surgery: Any) -> None:  # noqa: ANN401
    model = apply(make(), surgery)
    shake(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert all(loss.isfinite() for loss in train(model))
    added = no_decay(model)
    assert len(added) == (12 if surgery.name == "normformer" else 6)
    assert not [name for name in added if torch.equal(model.get_parameter(name), before[name])]
    contract.generation_with_a_cache_is_the_same(model)


@every_surgery
@every_family
def test_saved_model_is_loaded_with_it(surgery: Any, family: str, tmp_path: Path) -> None:  # noqa: ANN401
    made = surgery()
    model = apply(FAMILIES[family](), made)
    shake(model)
    contract.saved_and_loaded_it_is_the_same(model, made, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer_decays_none_of_its_parameters(family: str, tmp_path: Path) -> None:
    model = apply(FAMILIES[family](), HybridNorm())
    assert len(no_decay(model)) == 2 * 3
    contract.trainer_decays_matrices_only_and_trains(model, tmp_path)


@every_surgery
def test_it_refuses_what_contradicts_it(surgery: Any) -> None:  # noqa: ANN401
    for other in (QKNorm(), NormFormer()):
        with pytest.raises(AttachError, match="contradict"):
            apply(llama(), surgery(), other)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=61, add_cross_attention=True
    )
    with pytest.raises(AttachError, match="cross attention"):
        apply(transformers.GPT2LMHeadModel(config), surgery())
    with pytest.raises(ValueError, match="eps must be a finite number above 0, got -1"):
        surgery(-1)
