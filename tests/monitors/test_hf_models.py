"""Monitors on models of transformers: what they find there, and what they leave behind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="models of transformers are looked at")

import stablekit  # noqa: E402
from stablekit.errors import AttachError  # noqa: E402
from stablekit_monitors import (  # noqa: E402
    ActivationMonitor,
    AttentionMonitor,
    ClippingBias,
    ContrastiveMonitor,
    LogitsMonitor,
    ResidualMonitor,
    UpdateMonitor,
)
from tests.monitors.families import FAMILIES, attention_of, batch, tiny  # noqa: E402
from tests.monitors.watched import hooks_in  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

# Families whose own code warns, of their loss type for instance, are not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
THREE = ("Llama", "GPT2", "Qwen3")
WITH_EXACT = [family for family in FAMILIES if family != "Gemma2"]
MONITORS: dict[str, Callable[[], Any]] = {
    "residual": lambda: ResidualMonitor(1),
    "logits": lambda: LogitsMonitor(1),
    "bound": lambda: AttentionMonitor(1),
    "exact": lambda: AttentionMonitor(1, mode="exact", name="exact"),
    "activation": ActivationMonitor,
    "update": lambda: UpdateMonitor(1, per_tensor=True),
    "clipping": lambda: ClippingBias(3, every=1),
}


def attached(model: nn.Module, *monitors: Any) -> stablekit.Session:  # noqa: ANN401 - plugins
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return stablekit.attach(optimizer, *monitors, model=model)


def one_step(session: stablekit.Session, *batches: dict[str, Tensor]) -> dict[str, float]:
    (optimizer,) = session.optimizers
    assert session.model is not None
    optimizer.zero_grad()
    for one in batches:
        session.model(**one, use_cache=False).loss.backward()
    optimizer.step()
    return session.metrics()


def softmax_inputs(model: nn.Module, one: dict[str, Tensor]) -> list[Tensor]:
    """Return what goes into the softmax of a model with eager attention, layer by layer."""
    seen: list[Tensor] = []
    original = nn.functional.softmax

    def spy(x: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401 - as torch
        if x.ndim == 4:
            seen.append(x.detach().clone())
        return original(x, *args, **options)

    with mock.patch.object(nn.functional, "softmax", spy), torch.no_grad():
        model(**one, use_cache=False)
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WITH_EXACT)
def test_exact_logits_are_those_that_go_into_the_softmax(family: str, implementation: str) -> None:
    one = batch(padded=True)
    eager = softmax_inputs(tiny(family, attn_implementation="eager"), one)
    real = one["attention_mask"].bool()
    expected = [max(float(layer[b, :, real[b]].max()) for b in range(2)) for layer in eager]
    model = tiny(family, attn_implementation=implementation)
    metrics = one_step(attached(model, MONITORS["exact"]()), one)
    found = [v for k, v in metrics.items() if k.startswith("exact/") and "largest" not in k]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_holds_and_is_not_far_off(family: str) -> None:
    one = batch()
    eager = tiny(family, attn_implementation="eager", **_uncapped(family))
    exact = [float(layer.max()) for layer in softmax_inputs(eager, one)]
    metrics = one_step(attached(tiny(family, **_uncapped(family)), AttentionMonitor(1)), one)
    names = [f"attention-monitor/{name}" for name in _names(eager)]
    for name, largest in zip(names, exact, strict=True):
        assert largest <= metrics[name] * (1 + 1e-5) <= 4 * largest


def _uncapped(family: str) -> dict[str, Any]:
    return {"attn_logit_softcapping": None} if family == "Gemma2" else {}


def _names(model: nn.Module) -> list[str]:
    modules = attention_of(model)
    return [name for name, module in model.named_modules() if any(module is m for m in modules)]


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_bound_is_the_product_of_norms_by_hand(family: str) -> None:
    one, model = batch(), tiny(family)
    made: list[Tensor] = []
    layer = attention_of(model)[0]
    parts = [layer.c_attn] if family == "GPT2" else [layer.q_proj, layer.k_proj]
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: made.append(output.detach()))
    metrics = one_step(attached(model, AttentionMonitor(1)), one)
    query, key = made[0].split(32, dim=-1)[:2] if family == "GPT2" else made
    q, k = (x.unflatten(-1, (-1, 8)).norm(dim=-1).amax((0, 1)) for x in (query, key))
    products = q * k.repeat_interleave(len(q) // len(k))
    expected = float(products.max()) * 8**-0.5
    assert metrics[f"attention-monitor/{_names(model)[0]}"] == pytest.approx(expected, rel=1e-5)


def test_what_yarn_adds_to_lengths_is_in_the_bound() -> None:
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 8}
    plain, yarn = (
        one_step(attached(tiny("Llama", **more), AttentionMonitor(1)), batch())
        for more in ({}, {"rope_parameters": rope})
    )
    gain = (0.1 * math.log(8.0) + 1.0) ** 2
    key = "attention-monitor/model.layers.0.self_attn"
    assert yarn[key] / plain[key] == pytest.approx(gain, rel=1e-5)


def test_attention_that_hides_its_logits_is_refused() -> None:
    with pytest.raises(AttachError, match="soft-capped at 50"):
        attached(tiny("Gemma2"), AttentionMonitor(mode="exact"))
    flex = tiny("Llama")
    flex.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(AttachError, match="its implementation is 'flex_attention'"):
        attached(flex, AttentionMonitor(mode="exact"))
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bert = transformers.BertForMaskedLM(config)
    with pytest.raises(AttachError, match=r"here are .*BertSelfAttention"):
        attached(bert, AttentionMonitor())


@pytest.mark.parametrize("family", THREE)
def test_blocks_and_logits_are_found(family: str) -> None:
    one, model = batch(), tiny(family)
    blocks = model.transformer.h if family == "GPT2" else model.model.layers
    made: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: made.append(
                (output if isinstance(output, Tensor) else output[0]).detach()
            )
        )
    with torch.no_grad():
        logits = model(**one, use_cache=False).logits
    expected = [float(x.double().square().mean().sqrt()) for x in made]
    made.clear()
    metrics = one_step(attached(model, ResidualMonitor(1), LogitsMonitor(1)), one)
    found = [v for k, v in metrics.items() if k.startswith("residual") and "largest" not in k]
    assert found == pytest.approx(expected, rel=1e-5)
    partition = torch.logsumexp(logits.double(), -1)
    assert metrics["logits-monitor/logsumexp"] == pytest.approx(float(partition.mean()), rel=1e-5)
    assert metrics["logits-monitor/largest"] == pytest.approx(float(logits.abs().max()), rel=1e-6)


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("family", THREE)
def test_training_is_the_same_bit_by_bit_and_no_hook_stays(family: str, name: str) -> None:
    ends = []
    for monitors in ([], [MONITORS[name]()]):
        model = tiny(family)
        before, implementation = hooks_in(model), model.config._attn_implementation
        session = attached(model, "global-norm", *monitors)
        for step in range(3):
            one_step(session, batch(step), batch(step + 10, padded=True))
        session.detach()
        assert hooks_in(model) == before
        assert model.config._attn_implementation == implementation
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_gradient_checkpointing_changes_no_metric(family: str, reentrant: bool) -> None:
    seen = []
    for checkpointed in (False, True):
        model = tiny(family)
        if checkpointed:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        measures = [MONITORS[name]() for name in ("residual", "logits", "bound", "exact")]
        metrics = one_step(attached(model, *measures), batch(1), batch(2, padded=True))
        seen.append({key: value for key, value in metrics.items() if "/" in key})
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_shows_the_same(checkpointed: bool) -> None:
    torch._dynamo.reset()
    seen = []
    for compiled in (False, True):
        model = tiny("Llama")
        if checkpointed:
            model.gradient_checkpointing_enable()
        session = attached(model, ResidualMonitor(2), LogitsMonitor(2), AttentionMonitor(2))
        if compiled:
            session.model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        for step in range(4):
            metrics = one_step(session, batch(step), batch(step + 9))
        seen.append({key: value for key, value in metrics.items() if "/" in key})
    assert len(seen[0]) > 8
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_module_that_goes_bad_is_named(family: str) -> None:
    model = tiny(family)
    name = "transformer.h.1.mlp.c_fc" if family == "GPT2" else "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        dict(model.named_parameters())[f"{name}.weight"][0, 0] = math.nan
    session = attached(model, "nonfinite-guard", ActivationMonitor())
    one_step(session, batch())
    (event,) = [event for event in session.events if event.kind == "nonfinite-activation"]
    assert event.data["module"] == name


def test_lora_layers_are_looked_at_where_they_wrap_a_projection() -> None:
    peft = pytest.importorskip("peft", reason="LoRA models need peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("Llama"), config)
    monitors = (AttentionMonitor(1), MONITORS["exact"](), ResidualMonitor(1), LogitsMonitor(1))
    metrics = one_step(attached(model, *monitors), batch())
    name = "base_model.model.model.layers.0.self_attn"
    assert 0 < metrics[f"exact/{name}"] <= metrics[f"attention-monitor/{name}"]
    assert metrics["residual-monitor/base_model.model.model.layers.1"] > 0
    assert metrics["logits-monitor/logsumexp"] > 0


def test_both_embeddings_of_clip_are_found() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}
    vision = {**small, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    model = transformers.CLIPModel(config).train()
    session = attached(model, ContrastiveMonitor(1), ResidualMonitor(1))
    inputs = {"input_ids": torch.randint(0, 49, (4, 8)), "pixel_values": torch.randn(4, 3, 8, 8)}
    out = model(**inputs, return_loss=True)
    out.loss.backward()
    session.optimizers[0].step()
    metrics = session.metrics()
    x, y = (
        nn.functional.normalize(e.detach(), dim=-1) for e in (out.image_embeds, out.text_embeds)
    )
    expected = {
        "gap": float((x.mean(0) - y.mean(0)).norm()),
        "alignment": float((x - y).square().sum(-1).mean()),
        "uniformity_first": float(torch.pdist(x).square().mul(-2).exp().mean().log()),
        "uniformity_second": float(torch.pdist(y).square().mul(-2).exp().mean().log()),
        "logit_scale": model.logit_scale.exp().item(),
    }
    found = {key: metrics[f"contrastive-monitor/{key}"] for key in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    blocks = [key for key in metrics if key.startswith("residual-monitor/")]
    assert any("text_model" in key for key in blocks)
    assert any("vision_model" in key for key in blocks)
