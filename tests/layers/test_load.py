"""What was saved with surgeries loads with them, and nothing loads it silently without."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("transformers")

from stablekit.errors import StateError, StateWarning
from stablekit_layers import PeriNorm, QKNorm, apply, check, load
from tests.layers.models import FAMILIES, llama, logits, shake, tokens, transformers
from tests.layers.test_apply import Doubled

if TYPE_CHECKING:
    from pathlib import Path

CASES = [
    (family, surgeries)
    for family in FAMILIES
    for surgeries in ((QKNorm(),), (PeriNorm(embedding=False),), (QKNorm(), PeriNorm()))
    if family != "qwen3" or not isinstance(surgeries[0], QKNorm)
]


def saved(folder: Path, family: str, *surgeries: Any) -> Any:  # noqa: ANN401
    model = apply(FAMILIES[family](), *surgeries)
    shake(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("family", "surgeries"), CASES)
def test_saved_and_loaded_it_computes_the_same(
    tmp_path: Path, family: str, surgeries: tuple[Any, ...]
) -> None:
    model = saved(tmp_path, family, *surgeries)
    for cls in (type(model), transformers.AutoModelForCausalLM):
        loaded: Any = load(cls, tmp_path, surgeries=surgeries)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.stablekit_surgery == model.config.stablekit_surgery
        check(loaded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"attn_implementation": "sdpa"}, {"dtype": torch.bfloat16}])
def test_plain_from_pretrained_is_an_error_that_says_what_to_do(
    tmp_path: Path, family: str, how: dict[str, Any]
) -> None:
    model = saved(tmp_path, family, PeriNorm())
    for cls in (type(model), transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(
            ValueError,
            match=r"\(peri-ln\) .* model = stablekit_layers\.load\((Llama|GPT2|Qwen3)\w+, path\)",
        ):
            cls.from_pretrained(tmp_path, **how)


def test_what_was_loaded_saves_and_loads_again_in_shards(tmp_path: Path) -> None:
    model = saved(tmp_path / "one", "llama", QKNorm())
    again: Any = load(type(model), tmp_path / "one", surgeries=[QKNorm()])
    again.save_pretrained(tmp_path / "two", max_shard_size="10KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    loaded: Any = load(type(model), tmp_path / "two", surgeries=[QKNorm()])
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"stablekit_layers\.load"):
        type(model).from_pretrained(tmp_path / "two")


def test_arguments_of_from_pretrained_are_passed_on(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", QKNorm())
    loaded: Any = load(
        type(model),
        tmp_path,
        surgeries=[QKNorm()],
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    assert {param.dtype for param in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.name_or_path == str(tmp_path)


@pytest.mark.parametrize("auto", [False, True])
def test_values_of_the_configuration_are_taken_as_from_pretrained_takes_them(
    tmp_path: Path, auto: bool
) -> None:
    model = saved(tmp_path / "changed", "llama", QKNorm())
    llama().save_pretrained(tmp_path / "plain")
    cls = transformers.AutoModelForCausalLM if auto else type(model)
    given: dict[str, Any] = {
        "use_cache": False,
        "attention_dropout": 0.1,
        "output_attentions": True,
    }
    given |= {"attn_implementation": "eager", "dtype": torch.float64, "low_cpu_mem_usage": True}
    loaded: Any = load(cls, tmp_path / "changed", surgeries=[QKNorm()], **given)
    plain = cls.from_pretrained(tmp_path / "plain", **given)
    for key in ("use_cache", "attention_dropout", "output_attentions", "_attn_implementation"):
        assert getattr(loaded.config, key) == getattr(plain.config, key)
    assert loaded.model.layers[0].self_attn.attention_dropout == 0.1
    assert {param.dtype for param in loaded.parameters()} == {torch.float64}
    with pytest.raises(TypeError, match="unexpected keyword argument 'use_cash'"):
        load(cls, tmp_path / "changed", surgeries=[QKNorm()], use_cash=False)


def test_a_new_head_is_made_on_request_and_named(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", QKNorm(), PeriNorm())
    for cls in (
        transformers.LlamaForSequenceClassification,
        transformers.AutoModelForSequenceClassification,
    ):
        with pytest.raises(StateError, match=r"'score\.weight'.*'lm_head\.weight'.*new_head=True"):
            load(cls, tmp_path, num_labels=3)
        words = r"to be trained, are score\.weight; left out were lm_head\.weight"
        with pytest.warns(StateWarning, match=words) as told:
            loaded: Any = load(cls, tmp_path, new_head=True, num_labels=3)
        assert told[0].filename == __file__
        assert loaded.score.weight.shape == (3, 32)
        assert loaded.score.weight.isfinite().all()
        body, expected = loaded.model.state_dict(), model.model.state_dict()
        assert body.keys() == expected.keys()
        assert all(torch.equal(body[key], expected[key]) for key in expected)
        check(loaded)


def test_a_head_of_another_width_is_new(tmp_path: Path) -> None:
    model = apply(transformers.LlamaForSequenceClassification(llama().config), QKNorm())
    model.save_pretrained(tmp_path)
    with pytest.warns(StateWarning, match=r"are score\.weight; left out were none"):
        loaded: Any = load(type(model), tmp_path, new_head=True, num_labels=5)
    assert loaded.score.weight.shape == (5, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same: Any = load(type(model), tmp_path, new_head=True)
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_model_alone_is_a_model_of_another_head(tmp_path: Path, family: str) -> None:
    model = saved(tmp_path, family, QKNorm(), PeriNorm())
    body, base = model.base_model, tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)  # GPT-2's head is tied, so nothing is left
        loaded: Any = load(type(body), tmp_path, new_head=True)
    body.eval()
    expected = body(base).last_hidden_state
    assert torch.equal(loaded(base).last_hidden_state, expected)


def test_a_new_head_is_no_excuse_for_another_body(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", QKNorm())
    content = json.loads((tmp_path / "config.json").read_text())
    content["intermediate_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match=r"mismatched_keys.*mlp\.down_proj\.weight") as caught:
        load(type(model), tmp_path, new_head=True)
    assert "new_head=True" not in str(caught.value)
    content["stablekit_surgery"] = [{"name": "peri-ln", "arguments": PeriNorm().arguments}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match=r"missing_keys.*mlp_out_norm.*unexpected_keys.*q_norm"):
        load(transformers.LlamaForSequenceClassification, tmp_path, new_head=True)
    with pytest.raises(StateError, match=r"missing_keys.*mlp_out_norm.*unexpected_keys.*q_norm"):
        load(transformers.LlamaModel, tmp_path, new_head=True)


def test_a_model_of_half_precision_stays_one(tmp_path: Path) -> None:
    model = apply(llama(), PeriNorm()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded: Any = load(type(model), tmp_path, surgeries=[PeriNorm()])
    found = loaded.state_dict()
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[key], weight) for key, weight in model.state_dict().items())


def test_a_model_of_another_head_loads_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = llama(num_labels=3).config
    model = apply(transformers.LlamaForSequenceClassification(config), PeriNorm())
    model.save_pretrained(tmp_path)
    loaded: Any = load(type(model), tmp_path, surgeries=[PeriNorm()])
    assert torch.equal(logits(loaded), logits(model))


def test_weights_that_are_missing_or_left_over_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", QKNorm())
    content = json.loads((tmp_path / "config.json").read_text())
    content["stablekit_surgery"] = [{"name": "peri-ln", "arguments": PeriNorm().arguments}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match=r"missing_keys.*mlp_out_norm.*unexpected_keys.*q_norm"):
        load(type(model), tmp_path, surgeries=[PeriNorm()])


def test_a_folder_without_a_surgery_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(
        StateError, match=r"without a surgery: use LlamaForCausalLM\.from_pretrained"
    ):
        load(transformers.LlamaForCausalLM, tmp_path)


def test_a_surgery_that_no_distribution_provides_is_given_as_an_instance(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", Doubled(factor=1.0))
    loaded: Any = load(type(model), tmp_path, surgeries=[Doubled(factor=1.0)])
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="no installed surgery is named 'doubled'"):
        load(type(model), tmp_path)


def test_state_dict_refuses_a_model_without_the_surgery() -> None:
    state = apply(llama(), QKNorm()).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        llama().load_state_dict(state)
