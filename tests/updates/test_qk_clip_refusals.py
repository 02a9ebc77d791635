"""What QKClip refuses, and how it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit_updates import QKClip
from tests.monitors.watched import Run, Transformer, backward, hooks_in
from tests.updates.clipped import EXACT, Plus, loud, still

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_restriction_to_part_of_a_layer_is_refused() -> None:
    plugin = stablekit.only(QKClip(1.0, **EXACT), exclude="*.wk.bias")
    with pytest.raises(AttachError, match=r"together with blocks\.0\.attn\.wk\.bias, which no"):
        Run(plugin, model=loud(), make=still).step(3)


def test_an_optimizer_without_these_weights_is_refused() -> None:
    model = Transformer()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    stablekit.attach(optimizer, QKClip(1.0, **EXACT), model=model)
    backward(model)
    with pytest.raises(AttachError, match=r"no optimizer holds, as blocks\.0\.attn\.wq\.weight"):
        optimizer.step()


def frozen() -> nn.Module:
    model = nn.ModuleDict({"wq": nn.Linear(4, 4), "wk": nn.Linear(4, 4)})
    model["wq"].weight.requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"wq": nn.Linear(4, 4), "wk": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    model["out"].weight = model["wk"].weight
    return model


def parametrized() -> nn.Module:
    model = nn.ModuleDict({"wq": nn.Linear(4, 4), "wk": nn.Linear(4, 4)})
    nn.utils.parametrizations.spectral_norm(model["wq"])
    return model


def quantised() -> nn.Module:
    model = nn.ModuleDict({"wq": nn.Linear(4, 4), "wk": nn.Linear(4, 4)})
    kept = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model["wk"].weight = kept
    return model


def of(query: nn.Module) -> nn.Module:
    return nn.ModuleDict({"wq": query, "wk": nn.Linear(4, 4)})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen": (frozen, r"wq\.weight: it is frozen"),
    "tied": (tied, r"used as wk\.weight and out\.weight"),
    "parametrized": (parametrized, "computed by a parametrization"),
    "quantised": (quantised, "quantised"),
    "no weight": (lambda: of(nn.Identity()), "a Identity makes them"),
    "other kind": (lambda: of(nn.Bilinear(4, 4, 4)), "come from a Bilinear"),
    "odd norm": (lambda: of(Plus(root=True)), "neither by its weight nor by 1 plus it"),
    "other width": (lambda: of(nn.Linear(4, 6)), "not heads of 4|but makes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_scaled_are_refused_and_no_hook_is_left(case: str) -> None:
    make, said = REFUSED[case]
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    clip = QKClip(logits="bound", query="wq", key="wk", head_dim=4)
    with pytest.raises(AttachError, match=said):
        stablekit.attach(optimizer, clip, model=model)
    assert hooks_in(model) == 0


def test_without_a_model_the_error_says_how_to_give_one() -> None:
    optimizer = torch.optim.SGD(Transformer().parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"model=\.\.\."):
        stablekit.attach(optimizer, QKClip())


def test_an_unknown_model_is_refused_with_what_to_do() -> None:
    class MyAttention(nn.Linear):
        """Attention that nobody knows."""

    with pytest.raises(AttachError, match="Name the modules"):
        Run(QKClip(), model=nn.ModuleDict({"attn": MyAttention(4, 2)}))
    with pytest.raises(AttachError, match=r"attn is torch's nn\.MultiheadAttention"):
        Run(QKClip(), model=nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}))


def test_latent_attention_is_refused() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"kv_b_proj": nn.Linear(4, 4)})})
    with pytest.raises(AttachError, match="latent attention"):
        Run(QKClip(), model=model)


class Half(nn.Linear):
    """The heads of one rank."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : self.out_features // 2]


class HalfAttention(nn.Module):
    """Two heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk = Half(8, 16), Half(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (self.wq, self.wk))
        return nn.functional.scaled_dot_product_attention(query, key, key)


@pytest.mark.parametrize("logits", ["exact", "bound"])
def test_heads_that_are_not_all_here_are_refused(logits: str) -> None:
    model = nn.ModuleDict({"attn": HalfAttention()})
    names: dict[str, Any] = {"query": "attn.wq", "key": "attn.wk", "head_dim": 4}
    names |= {"layers": "attn"} if logits == "exact" else {}
    stablekit.attach(still(model.parameters()), QKClip(logits=logits, **names), model=model)
    with pytest.raises(AttachError, match="tensor parallelism"):
        model["attn"](torch.ones(1, 3, 8))
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"logits": "guess"}, "logits must be one of"),
        ({"query": "a"}, "name both"),
        ({"head_dim": 4}, "go with query="),
        ({"fused": True}, "go with query="),
        ({"query": "a", "key": "b"}, "takes layers="),
        ({"query": "a", "key": "b", "layers": "c", "logits": "bound"}, "bound' does not"),
        ({"query": "a", "key": "b", "layers": "c", "scale": 2.0}, "scale goes with"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        QKClip(**arguments)
