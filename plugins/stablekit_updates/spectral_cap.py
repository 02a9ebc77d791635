"""Capping the largest singular value of every weight matrix.

Newhouse et al.: Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338) compare
the ways to do so; this is their spectral normalisation, Miyato et al. (arXiv 1802.05957), as a
projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from stablekit import hookimpl
from stablekit.arguments import number, plugin_name
from stablekit.arguments import whole as whole_number
from stablekit.gradients import local
from stablekit_updates._weights import report, within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step

__all__ = ["SpectralCap", "power_iteration", "stirred", "top_right_vector"]


def power_iteration(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of ``W v``, and the unit vector along ``W^T W v``.

    Repeated, the norm grows to the largest singular value.

    Args:
        matrix: W, ``[m, n]``.
        vector: v, ``[n]``, of norm 1.

    Returns:
        0-dim estimate of the largest singular value, never above it; the next vector ``[n]``.

    Example:
        >>> power_iteration(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0]))
        (tensor(3.), tensor([1., 0.]))
    """
    image: Tensor = matrix @ vector
    back: Tensor = matrix.T @ image
    length = torch.linalg.vector_norm(back)
    return torch.linalg.vector_norm(image), torch.where(length > 0, back / length, vector)


def top_right_vector(matrix: Tensor) -> Tensor:
    """Return the right singular vector of the largest singular value, ``[n]``, exactly.

    Example:
        >>> top_right_vector(torch.tensor([[0.0, 0.0], [0.0, 2.0]])).abs()
        tensor([0., 1.])
    """
    is_tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if is_tall else matrix @ matrix.T
    vector: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -1]
    if not is_tall:
        vector = matrix.T @ vector
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp(min=torch.finfo(vector.dtype).tiny)


def stirred(vector: Tensor) -> Tensor:
    """Return a unit vector near this one, with a part in every direction.

    Power iteration never leaves a subspace: from zeros, or from a vector at right angles to the
    direction that grows, it would not find that direction.

    Example:
        >>> stirred(torch.zeros(4)).abs().min() > 0
        tensor(True)
    """
    noise = torch.randn(vector.numel(), generator=torch.Generator().manual_seed(0))
    noise = (noise / torch.linalg.vector_norm(noise)).to(vector)
    mixed: Tensor = vector + 1e-2 * noise
    length: Tensor = torch.linalg.vector_norm(mixed)
    return mixed / length


@final
class SpectralCap:
    """Scale down, after every update, matrices whose largest singular value is above ``limit``.

    ``W <- W * min(1, limit / sigma)``. Weights of more than two dims count as matrices of their
    output units. ``sigma`` is found by power iteration from a vector that is kept, and saved, from
    step to step; the first is exact. The estimate is
    never above ``sigma``, so the cap is exceeded by what it lags behind: 0.06% for updates of 0.7%
    of the weights' norm, 0.2% for updates of 2%, with 4 iterations on matrices without a gap in
    their spectrum.

    Embeddings are better capped row by row (:class:`~stablekit_updates.MaxNorm`): leave them out
    with ``only(..., exclude="*embed*")``.

    Args:
        limit: the cap, above 0.
        iterations: power iterations an update.
        name: the plugin's name in the session.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import stablekit
        >>> w = torch.nn.Parameter(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> optimizer = stablekit.wrap(torch.optim.SGD([w], lr=0.1), SpectralCap(2.0))
        >>> w.grad = torch.zeros(2, 2)
        >>> optimizer.step()
        >>> w.data
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])
    """

    cost = "two reads of the matrices an iteration, and a write of those above the cap"
    needs = ("parameters",)

    def __init__(self, limit: float, *, iterations: int = 4, name: str | None = None) -> None:
        """Check the arguments and start without vectors."""
        self.limit = number("limit", limit, above=0)
        self.iterations = whole_number("iterations", iterations, at_least=1)
        self.name = plugin_name(name, "spectral-cap")
        self._vectors: dict[str, Tensor] = {}

    @classmethod
    def example(cls) -> SpectralCap:
        """Return an instance that acts on weights of ordinary size."""
        return cls(0.5)

    @hookimpl
    def after_update(self, step: Step) -> None:
        """Cap the matrices."""
        acted = {}
        named = zip(step.gradients.names, step.parameters, strict=True)
        for i, (name, param) in enumerate(named):
            if param.ndim < 2 or not param.numel():
                continue
            sigma = self._sigma(name, param.detach().flatten(1))
            capped = within(self.limit, param.dtype) / sigma
            acts = (sigma > self.limit) & step.ok
            acted[i] = acts
            if not step.session.host or bool(acts):
                local(param.detach()).mul_(torch.where(acts, capped, 1.0))
        report(step, acted)

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors by parameter name."""
        return {"vectors": {name: vector.cpu() for name, vector in self._vectors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved vectors.

        Raises:
            TypeError: They are no vectors by name.
            ValueError: One is not finite.
        """
        vectors = dict(state["vectors"])
        for name, vector in vectors.items():
            if not isinstance(vector, Tensor) or vector.ndim != 1:
                raise TypeError(f"vectors[{name!r}] must be a vector, got {vector!r}")
            if not bool(vector.isfinite().all()):
                raise ValueError(f"vectors[{name!r}] must be finite, got {vector!r}")
        self._vectors = vectors

    def _sigma(self, name: str, matrix: Tensor) -> Tensor:
        """Return the largest singular value of a matrix, the same on every rank."""
        kind = torch.promote_types(matrix.dtype, torch.float32)
        matrix = matrix.to(kind)
        vector = self._vectors.get(name)
        if vector is None or vector.numel() != matrix.shape[1]:
            vector = top_right_vector(_gathered(matrix).nan_to_num(0.0, 0.0, 0.0))
        vector = stirred(vector.to(local(matrix).device, kind))
        sigma = vector.new_zeros(())
        for _ in range(self.iterations):
            sigma, following = power_iteration(matrix, _replicated(vector, matrix))
            vector = _gathered(following)
        self._vectors[name] = vector
        return _gathered(sigma)


def _gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor; anything else as it is."""
    gather = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gather is None else gather()
    return full


def _replicated(vector: Tensor, like: Tensor) -> Tensor:
    """Put a vector that all ranks hold on the mesh of a DTensor."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return vector
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(vector, mesh, [Replicate()] * mesh.ndim, run_check=False)
