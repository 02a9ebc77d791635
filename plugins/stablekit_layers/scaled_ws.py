"""Scaled weight standardisation of convolutions and linear layers.

Brock et al.: Characterizing signal propagation to close the performance gap in unnormalized ResNets
(arXiv 2101.08692); High-performance large-scale image recognition without normalization
(arXiv 2102.06171). DeepMind's code floors ``fan_in * variance``; timm adds its ``eps`` to the
variance and multiplies the gain of the activation into the weights. ``form`` names the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stablekit.arguments import choice, flag, number, plugin_name
from stablekit.errors import AttachError
from stablekit.forward import modules
from stablekit_layers._gains import is_transposed
from stablekit_layers._selection import chosen_layers, patterns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["GAMMAS", "ScaledWeightStandardization", "StandardizedWeight", "standardize"]

GAMMAS: Final[Mapping[str, float]] = {
    "relu": 1.7139588594436646,
    "gelu": 1.7015043497085571,
    "silu": 1.7881293296813965,
    "tanh": 1.5939117670059204,
}
"""What makes the variance of an activation 1 when its input is a standard normal."""

_FORMS = ("deepmind", "timm")


def standardize(
    weight: Tensor, *, eps: float = 1e-4, form: str = "deepmind", transposed: bool = False
) -> Tensor:
    """Return ``(W_i - mean_i) / sqrt(max(fan_in * var_i, eps))``, rows of mean 0 and norm 1.

    Args:
        weight: ``[out, ...]``; mean and (biased) variance are over all other dims.
        eps: the smallest ``fan_in * var``. In timm's form it is added to the variance.
        form: "deepmind", or "timm": ``(W_i - mean_i) / sqrt(fan_in * (var_i + eps))``.
        transposed: whether it is ``[in, out]``.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0]]))
        tensor([[-0.7071,  0.7071]])
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    dims = (0,) if transposed else tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    fan_in = wide.numel() // max(1, var.numel())
    square = fan_in * (var + eps) if form == "timm" else (fan_in * var).clamp(min=eps)
    return ((wide - mean) * square.rsqrt()).to(weight.dtype)


@final
class StandardizedWeight(nn.Module):
    """The parametrization: what the weight of a layer becomes before it is used.

    Args:
        layer: what it is for; says the number of outputs, device and dtype.
        eps: as of :func:`standardize`.
        form: likewise.
        gamma: a fixed factor.
        gain: whether there is a trained factor for each output, 1 at first.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> make = StandardizedWeight(layer)
        >>> torch.allclose(make(layer.weight).norm(dim=1), torch.ones(2))
        True
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        eps: float = 1e-4,
        form: str = "deepmind",
        gamma: float = 1.0,
        gain: bool = True,
    ) -> None:
        """Make the gains."""
        super().__init__()
        self.eps, self.form, self.gamma = eps, form, gamma
        self.transposed = is_transposed(layer)
        weight = cast("Tensor", layer.weight)
        shape = [1] * weight.dim()
        out = 1 if self.transposed else 0
        shape[out] = weight.shape[out]
        self._shape = tuple(shape)
        # A row's gain is its norm, and Trainer does not decay what is named so.
        self.row_norm = (
            nn.Parameter(torch.ones(shape[out], device=weight.device, dtype=weight.dtype))
            if gain
            else None
        )

    def reset_parameters(self) -> None:
        """Set the gains to 1, as torch asks of modules that were made without values."""
        if self.row_norm is not None:
            nn.init.ones_(self.row_norm)

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the layer computes with."""
        made = standardize(weight, eps=self.eps, form=self.form, transposed=self.transposed)
        made = made if self.gamma == 1 else made * self.gamma
        return made if self.row_norm is None else made * self.row_norm.view(self._shape)


@final
class ScaledWeightStandardization:
    """Compute the weights of convolutions and linear layers as ``gain * standardize(weight)``.

    ``W_i = gamma * g_i * (V_i - mean_i) / sqrt(max(fan_in * var_i, eps))`` for every output i, with
    a trained ``g_i`` that is 1 at first. The function of the model changes (means are removed);
    ``fold`` makes the weights plain again, bit for bit. It is a parametrization of torch: names of
    weights in a state dict change to ``parametrizations.weight.original``, and the model can be
    copied and saved but not pickled.

    Of a model of transformers all such layers of its base model are changed, not its heads. Of any
    other model all of them: leave out a classifier with ``exclude``.

    Args:
        eps: the smallest ``fan_in * var``; None is 1e-4, and 1e-6 in timm's form.
        gain: whether ``g`` is there.
        activation: "relu", "gelu", "silu" or "tanh" take their gain for ``gamma``, as timm does
            before layers that follow one; None is 1.
        form: "deepmind", or "timm", which adds ``eps`` to the variance.
        include: name of the layers, or a list of names, in which ``*`` stands for one part; None
            is all.
        exclude: likewise, of layers or of modules around them, that are left as they are.
        name: another name than "scaled-ws", for a second catalogue entry.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit_layers
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> _ = stablekit_layers.apply(model, ScaledWeightStandardization())
        >>> bool(model[0].weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """

    conflicts = frozenset({"scaled-ws"})
    computes_weights = True

    def __init__(
        self,
        *,
        eps: float | None = None,
        gain: bool = True,
        activation: str | None = None,
        form: str = "deepmind",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.form = choice("form", form, _FORMS)
        usual = 1e-6 if form == "timm" else 1e-4
        self.eps = usual if eps is None else number("eps", eps, above=0)
        self.gain = flag("gain", gain)
        self.activation = activation and choice("activation", activation, tuple(GAMMAS))
        self.include = patterns("include", include)
        self.exclude = patterns("exclude", exclude)
        self.name = plugin_name(name, "scaled-ws")

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What makes an equal surgery."""
        return {
            "eps": self.eps,
            "gain": self.gain,
            "activation": self.activation,
            "form": self.form,
            "include": self.include,
            "exclude": self.exclude,
        }

    def check(self, model: nn.Module) -> None:
        """Refuse layers whose weights are shared, or computed from others already."""
        names = modules.names_of_parameters(model)
        for name, layer in self._layers(model).items():
            if parametrize.is_parametrized(layer, "weight"):
                raise AttachError(f"the weight of {name} is computed from another already")
            tied = names[id(layer.weight)]
            if len(tied) > 1:
                raise AttachError(
                    f"{' and '.join(tied)} are one weight: {self.name} would part them; leave"
                    f" this layer out with exclude={name!r}"
                )

    def apply_to(self, model: nn.Module) -> None:
        """Register the parametrizations."""
        gamma = 1.0 if self.activation is None else GAMMAS[self.activation]
        for layer in self._layers(model).values():
            made = StandardizedWeight(
                layer, eps=self.eps, form=self.form, gamma=gamma, gain=self.gain
            )
            parametrize.register_parametrization(layer, "weight", made)

    def fold(self, model: nn.Module) -> None:
        """Let every layer hold the weight it computes with."""
        for layer in self._layers(model).values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            # The weight is last now; an optimizer's state goes by the order of parameters.
            bias = layer.bias
            del layer.bias
            layer.register_parameter("bias", cast("nn.Parameter | None", bias))

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return chosen_layers(model, self.name, self.include, self.exclude)
