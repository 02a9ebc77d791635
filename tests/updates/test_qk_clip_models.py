"""QKClip on models of transformers: every head's largest logit becomes the threshold."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import stablekit
from stablekit.errors import AttachError
from stablekit_updates import QKClip
from tests.monitors.families import attention_of, batch, tiny
from tests.updates.clipped import still

# Families whose own code warns, of their loss type for instance, are not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

GROUPS = {"Llama": 2, "Mistral": 2, "Mixtral": 2, "Qwen2": 2, "Gemma": 2, "SmolLM3": 2}
GROUPS |= {"GPT2": 4, "Olmo2": 2, "Qwen3": 1, "Gemma3": 1}
"""How many sets of the four heads can be clipped apart from each other."""


def model_of(family: str, **changes: Any) -> Any:  # noqa: ANN401 - a model of transformers
    """Return a tiny model with biases that are not zero."""
    model = tiny(family, attn_implementation="eager", **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".bias"):
                param.add_(torch.randn(param.shape, generator=generator))
    return model


class Replay:
    """Runs attention layers on the inputs that they had first, and shows what their softmax gets.

    So a layer can be looked at although those before it were changed.
    """

    def __init__(self, model: nn.Module, one: dict[str, Tensor]) -> None:
        self.layers = attention_of(model)
        self.mask = one["attention_mask"].bool()
        self.inputs: list[tuple[Any, Any]] = []

        def keep(module: nn.Module, given: Any, named: Any) -> None:  # noqa: ANN401 - as torch
            self.inputs.append((given, {**named, "past_key_values": None}))

        handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.layers]
        with torch.no_grad():
            model(**one, use_cache=False)
        for handle in handles:
            handle.remove()

    def logits(self) -> list[Tensor]:
        """Return logits ``[batch, heads, T, T]`` of each layer, -inf where masked or padding."""
        seen: list[Tensor] = []
        original = nn.functional.softmax

        def spy(x: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401 - as torch
            seen.append(x.detach().clone())
            return original(x, *args, **options)

        with mock.patch.object(nn.functional, "softmax", spy), torch.no_grad():
            for layer, (given, named) in zip(self.layers, self.inputs, strict=True):
                with evaluating(layer):
                    layer(*given, **named)
        padding = ~self.mask[:, None, :, None]
        return [x.masked_fill(padding, -torch.inf).masked_fill(x < -1e30, -torch.inf) for x in seen]


class evaluating:
    """Holds a module in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *error: object) -> None:
        self.module.train()


def clip(model: Any, one: dict[str, Tensor], plugin: QKClip) -> stablekit.Session:  # noqa: ANN401 - a model of transformers
    """Train one step in which only the clipping moves anything."""
    optimizer = still(model.parameters())
    session = stablekit.attach(optimizer, plugin, model=model)
    model(**one, use_cache=False).loss.backward()
    optimizer.step()
    return session


def maxima(logits: Tensor) -> Tensor:
    return logits.amax((0, 2, 3))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", GROUPS)
def test_logits_of_clipped_heads_are_scaled_to_the_threshold(
    family: str, implementation: str
) -> None:
    one, model = batch(padded=True), model_of(family)
    replay = Replay(model, one)
    before = replay.logits()
    threshold = 1.01 * float(torch.stack([maxima(x) for x in before]).median())
    model.set_attn_implementation(implementation)
    unchanged = {n: p.detach().clone() for n, p in model.named_parameters()}
    session = clip(model, one, QKClip(threshold))
    model.set_attn_implementation("eager")
    share = []
    for old, new in zip(before, replay.logits(), strict=True):
        largest = maxima(old).view(GROUPS[family], -1)
        gamma = (threshold / largest.clamp(min=threshold)).amin(1)
        gamma = gamma.repeat_interleave(largest.shape[1])
        share += (maxima(old) > threshold).tolist()
        finite = old.isfinite()
        expected = old * gamma[None, :, None, None]
        scale = float(old[finite].abs().max())
        torch.testing.assert_close(new[finite], expected[finite], rtol=1e-6, atol=1e-6 * scale)
        clipped = (gamma < 1).view(GROUPS[family], -1).any(1)
        tops = maxima(new).view(GROUPS[family], -1).amax(1)[clipped]
        torch.testing.assert_close(tops, torch.full_like(tops, threshold), rtol=2e-6, atol=0)
    assert any(share)
    assert not all(share) or GROUPS[family] == 1
    assert session.metrics()["qk-clip/clipped"] == pytest.approx(sum(share) / len(share))
    _only_these_moved(model, unchanged, family)


def _only_these_moved(model: nn.Module, before: dict[str, Tensor], family: str) -> None:
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    normed = family in ("Qwen3", "Gemma3", "Olmo2")
    parts = ("q_norm", "k_norm") if normed else ("q_proj", "k_proj", "c_attn")
    assert moved
    assert all(name.split(".")[-2] in parts for name in moved)
    for name in moved if family == "GPT2" else ():
        start = 64  # values
        after = dict(model.named_parameters())[name]
        assert torch.equal(after[..., start:], before[name][..., start:])


@pytest.mark.parametrize("family", [*GROUPS, "Gemma2", "Qwen2Moe", "Qwen3Moe"])
def test_the_bound_keeps_logits_below_the_threshold(family: str) -> None:
    uncapped = {"attn_logit_softcapping": None} if family == "Gemma2" else {}
    one, model = batch(), model_of(family, **uncapped)
    replay = Replay(model, one)
    threshold = float(torch.stack([maxima(x) for x in replay.logits()]).median())
    session = clip(model, one, QKClip(threshold, logits="bound"))
    assert session.metrics()["qk-clip/clipped"] > 0
    assert max(float(x.max()) for x in replay.logits()) <= threshold * (1 + 1e-5)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3", "Gemma3"])
def test_where_nothing_is_above_the_threshold_training_is_the_same_bitwise(family: str) -> None:
    runs = []
    for plugins in ([], [QKClip(1e6)]):
        model = model_of(family)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        stablekit.attach(optimizer, *plugins, model=model)
        for step in range(3):
            optimizer.zero_grad()
            model(**batch(step), use_cache=False).loss.backward()
            optimizer.step()
        runs.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradient_checkpointing_clips_alike(family: str) -> None:
    made = []
    for checkpointing in (False, True):
        model = model_of(family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        session = clip(model, batch(), QKClip(0.5))
        assert session.metrics()["qk-clip/clipped"] > 0
        made.append([param.detach() for param in model.parameters()])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_trains_under_stable_spam_and_a_guard_stays_at_the_threshold(
    fused: bool,
) -> None:
    largest = {}
    for clipper in (None, QKClip(2.0)):
        model, one = model_of("Llama"), batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
        chain = ["stable-spam", *([clipper] if clipper else []), "nonfinite-guard"]
        session = stablekit.attach(optimizer, *chain, model=model)
        losses = []
        for step in range(40):
            optimizer.zero_grad()
            loss = model(**one, use_cache=False).loss
            loss.backward()
            if step == 7:
                model.lm_head.weight.grad[0, 0] = torch.nan
            optimizer.step()
            losses.append(float(loss.detach()))
        assert session.metrics()["steps_skipped"] == 1
        assert losses[-1] < 0.01 * losses[0]
        largest[clipper is None] = max(float(x.max()) for x in Replay(model, one).logits())
    # The last update moved other weights too: layers see other inputs than those clipped for.
    assert largest[False] < 1.1 * 2.0
    assert largest[True] > 2 * 2.0


@pytest.mark.parametrize("logits", ["exact", "bound"])
def test_adapters_are_refused(logits: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(AttachError, match="is an adapter"):
        stablekit.attach(optimizer, QKClip(logits=logits), model=adapted)


def test_latent_attention_is_refused() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=1,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(AttachError, match=r"self_attn is multi-head latent attention"):
        stablekit.attach(still(model.parameters()), QKClip(), model=model)


@pytest.mark.parametrize(
    ("family", "said"), [("Gemma2", "soft-capped at 50"), ("Llama", "implementation is 'flex")]
)
def test_attention_that_hides_its_logits_is_refused(family: str, said: str) -> None:
    changes = {} if family == "Gemma2" else {"attn_implementation": "flex_attention"}
    model = tiny(family, **changes)
    with pytest.raises(AttachError, match=said):
        stablekit.attach(still(model.parameters()), QKClip(), model=model)
