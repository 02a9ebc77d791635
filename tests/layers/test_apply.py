"""``apply`` makes all surgeries or none, and records what it made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from stablekit.errors import AttachError, StateError
from stablekit_layers import PeriNorm, QKNorm, Surgery, apply, check, no_decay, parameter_groups
from tests.layers.models import (
    FAMILIES,
    gpt2,
    llama,
    logits,
    shake,
    transformers,
    with_adapters,
)


class Doubled:
    """A surgery of a third party on any model."""

    conflicts = frozenset({"halved"})

    def __init__(self, factor: float = 2.0, name: str = "doubled") -> None:
        self.name, self.factor = name, factor

    @property
    def arguments(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def check(self, model: nn.Module) -> None:
        if not any(isinstance(module, nn.Linear) for module in model.modules()):
            raise AttachError("no linear layer")

    def apply_to(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                with torch.no_grad():
                    module.weight.mul_(self.factor)


def test_a_surgery_of_a_third_party_is_made_on_a_plain_module() -> None:
    model = nn.Sequential(layer := nn.Linear(2, 2))
    before = layer.weight.detach().clone()
    assert isinstance(Doubled(), Surgery)
    assert apply(model, Doubled()) is model
    assert torch.equal(layer.weight, 2 * before)
    check(model)


def test_the_configuration_says_what_was_made() -> None:
    model = apply(llama(), QKNorm(1e-5, per="projection"), PeriNorm())
    assert model.config.stablekit_surgery == [
        {"name": "qk-norm", "arguments": {"eps": 1e-5, "per": "projection"}},
        {"name": "peri-ln", "arguments": {"eps": 1e-5, "embedding": True}},
    ]
    assert model.config.to_dict()["stablekit_surgery"] == model.config.stablekit_surgery
    assert [surgery.name for surgery in model.stablekit_surgery] == ["qk-norm", "peri-ln"]


def test_another_model_of_the_same_configuration_is_left_alone() -> None:
    config = llama().config
    one, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    apply(one, QKNorm())
    assert not hasattr(config, "stablekit_surgery")
    assert {id(m.config) for m in one.modules() if hasattr(m, "config")} == {id(one.config)}
    check(other)
    apply(other, PeriNorm())


@pytest.mark.parametrize(
    ("done", "more", "message"),
    [
        ([QKNorm()], [QKNorm()], "qk-norm cannot be made twice"),
        ([], [PeriNorm(), PeriNorm()], "peri-ln cannot be made twice"),
        ([Doubled()], [Doubled(name="halved")], "doubled and halved contradict"),
        ([Doubled(name="halved")], [Doubled()], "halved and doubled contradict"),
    ],
)
def test_what_contradicts_is_refused(done: list[Any], more: list[Any], message: str) -> None:
    model = apply(llama(), *done)
    names = set(model.state_dict())
    with pytest.raises(AttachError, match=message):
        apply(model, *more)
    assert set(model.state_dict()) == names


def test_nothing_is_changed_when_a_later_surgery_refuses() -> None:
    model = nn.Sequential(layer := nn.Linear(2, 2))
    before = layer.weight.detach().clone()
    with pytest.raises(AttachError, match="qk-norm knows the blocks of LLaMA"):
        apply(model, Doubled(), QKNorm())
    assert torch.equal(layer.weight, before)
    assert not hasattr(model, "stablekit_surgery")


def test_a_family_that_is_not_known_is_refused_with_its_blocks_and_those_that_are() -> None:
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = transformers.GPTNeoXForCausalLM(config)
    with pytest.raises(AttachError, match=r"Qwen3 and GPT-2 .* found: GPTNeoXLayer"):
        apply(model, QKNorm())


@pytest.mark.parametrize(
    ("family", "its_own"), [("Bert", False), ("Gemma", False), ("Olmo2", True)]
)
def test_only_families_with_norms_of_their_own_are_told_of_them(family: str, its_own: bool) -> None:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=61,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    with pytest.raises(AttachError, match=rf"found: .*{family}(Decoder)?Layer.*\)") as caught:
        apply(model, QKNorm())
    assert ("by themselves" in str(caught.value)) == its_own


def test_cross_attention_is_refused() -> None:
    with pytest.raises(AttachError, match="cross attention"):
        apply(gpt2(add_cross_attention=True), PeriNorm())


def test_what_is_no_model_is_refused_with_what_one_is() -> None:
    with pytest.raises(TypeError, match=r"a model that was built, .* got 'gpt2'"):
        apply("gpt2", QKNorm())  # type: ignore[type-var]


def test_wrapped_compiled_and_quantised_models_are_refused() -> None:
    with pytest.raises(AttachError, match=r"before torch\.compile"):
        apply(torch.compile(llama(), backend="eager"), QKNorm())  # type: ignore[type-var]
    with pytest.raises(AttachError, match="before DataParallel"):
        apply(nn.DataParallel(llama()), QKNorm())
    model = llama()
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match="quantised"):
        apply(model, QKNorm())


# What PEFT itself warns of is not what is tested.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_with_adapters_are_refused() -> None:
    model = llama()
    wrapped = with_adapters(model, "q_proj")
    for refused in (wrapped, model):
        with pytest.raises(AttachError, match="adapters"):
            apply(refused, QKNorm())


def test_check_refuses_the_plain_model_of_an_operated_configuration() -> None:
    config = apply(llama(), QKNorm()).config
    plain = transformers.LlamaForCausalLM(config)
    with pytest.raises(StateError, match=r"asks for the surgeries qk-norm .* made were none"):
        check(plain)
    with pytest.raises(AttachError, match="belong to a model with qk-norm"):
        apply(plain, PeriNorm())
    check(apply(plain, QKNorm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_added_on_the_device_and_in_the_type_of_those_next_to_them(
    family: str,
) -> None:
    with torch.device("meta"):
        model = FAMILIES[family]().to(torch.bfloat16)
    before = set(dict(model.named_parameters()))
    apply(model, PeriNorm(), *([QKNorm()] if family != "qwen3" else []))
    added = {k: p for k, p in model.named_parameters() if k not in before}
    assert added
    assert {(p.device.type, p.dtype) for p in added.values()} == {("meta", torch.bfloat16)}
    assert set(no_decay(model)) == set(added)


def test_a_model_built_on_meta_gets_its_gains_from_reset_parameters() -> None:
    with torch.device("meta"):
        model = apply(llama(), QKNorm())
    model.to_empty(device="cpu")
    norm = model.model.layers[0].self_attn.q_norm
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_groups_leave_out_what_was_added(family: str) -> None:
    plain, model = FAMILIES[family](), FAMILIES[family]()
    apply(model, PeriNorm(), *([QKNorm()] if family != "qwen3" else []))
    names = transformers.Trainer.get_decay_parameter_names
    assert set(names(None, model)) == set(names(None, plain))

    decayed, others = parameter_groups(model, weight_decay=0.1)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert all(param.ndim == 2 for param in decayed["params"])
    assert {id(p) for name, p in model.named_parameters() if name in no_decay(model)} <= {
        id(p) for p in others["params"]
    }


def test_tied_weights_stay_tied() -> None:
    model = apply(gpt2(), QKNorm(), PeriNorm())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_copy_of_the_model_has_hooks_of_its_own() -> None:
    model = apply(llama(), QKNorm(), PeriNorm())
    shake(model)
    twin = copy.deepcopy(model)
    expected = logits(twin)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)
    check(twin)


def test_the_same_surgery_under_two_names_is_refused() -> None:
    with pytest.raises(AttachError, match="b cannot be made twice"):
        apply(llama(), QKNorm(name="a"), QKNorm(name="b"))


def test_two_models_in_one_module_are_operated_on_one_by_one() -> None:
    both = torch.nn.ModuleDict({"a": llama(), "b": llama()})
    with pytest.raises(AttachError, match=r"a\.model\.layers, b\.model\.layers"):
        apply(both, QKNorm())
    for one in both.values():
        apply(one, QKNorm())
    assert all(hasattr(m, "q_norm") for n, m in both.named_modules() if n.endswith("self_attn"))
