"""Steps that are counted: the tensors of one rank, a chain attached to their optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

import stablekit
from benchmarks.scaling.counting import Counter, held, mean
from benchmarks.scaling.members import MEMBERS
from benchmarks.scaling.sizes import here
from benchmarks.workloads import Free

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from benchmarks.scaling.counting import Counts
    from benchmarks.scaling.sizes import Mesh, Shape

LOG_EVERY = 2
TORCH = "clip_grad_norm_"


@final
class FusedFree(torch.optim.Optimizer):
    """An optimizer that does nothing, and says that its kernel takes a factor."""

    _step_supports_amp_scaling = True

    def __init__(self, params: list[Parameter]) -> None:
        """Hold the parameters."""
        super().__init__(params, {"lr": 0.0, "fused": True})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # torch's is overloaded
        """Do nothing."""


@final
@dataclass(frozen=True)
class Case:
    """What is counted.

    Args:
        shapes: of the parameters of one stage.
        mesh: how they are spread.
        chain: names of members; or :data:`TORCH` alone, for torch's own function.
        fused: whether the optimizer takes a factor.
        device_mode: whether decisions stay on the device.
        simulated: on the meta device, where accelerators' code runs without data; then the other
            ranks need not exist.
    """

    shapes: tuple[Shape, ...]
    mesh: Mesh
    chain: tuple[str, ...]
    fused: bool = True
    device_mode: bool = True
    simulated: bool = False


@final
class Placed:
    """Parameters with gradients, spread over a mesh as ``fully_shard`` and the like do it."""

    def __init__(self, shapes: Sequence[Shape], mesh: Mesh, *, device: str) -> None:
        """Make this rank's part, which is of the size of the first rank's."""
        self.reduce_groups: list[ProcessGroup] = []
        self._mesh = mesh
        self._device_mesh = self._made(mesh)
        self._device = device
        self._parts: list[Tensor] = []
        self.params = [Parameter(self._tensor(shape)) for shape in shapes]
        self._parts.clear()
        for param, shape in zip(self.params, shapes, strict=True):
            param.grad = self._tensor(shape)

    def shrink(self) -> None:
        """Halve the gradients: what learns its limit from the past then clips nothing."""
        torch._foreach_mul_(self._parts, 0.5)

    def _made(self, mesh: Mesh) -> DeviceMesh | None:
        if not mesh.is_cut:
            return None
        sizes, ways = tuple(mesh.dims.values()), tuple(mesh.dims)
        whole = init_device_mesh("cpu", sizes, mesh_dim_names=ways)
        if mesh.pipeline == 1:
            return whole
        self.reduce_groups = [whole["pipeline"].get_group()]
        return whole[mesh.holding]

    def _tensor(self, shape: Shape) -> Tensor:
        part = torch.full(here(shape, self._mesh), 0.01, device=self._device)
        self._parts.append(part)
        if self._device_mesh is None:
            return part
        places = [_place(way, shape) for way in self._mesh.holding]
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part,
            self._device_mesh,
            places,
            run_check=False,
            shape=torch.Size(shape),
            stride=strides,
        )


def counted(case: Case) -> tuple[Counts, float]:
    """Return the mean of a step over a period of logging, and the bytes kept before its last."""
    placed = Placed(case.shapes, case.mesh, device="meta" if case.simulated else "cpu")
    if case.chain == (TORCH,):
        torch.nn.utils.clip_grad_norm_(placed.params, 1.0)
        return _count(partial(torch.nn.utils.clip_grad_norm_, placed.params, 1.0)), 0.0
    bare, optimizer = _optimizer(case, placed), _optimizer(case, placed)
    bare.step()
    session = stablekit.attach(
        optimizer,
        *(MEMBERS[name].plugin() for name in case.chain),
        device_mode=case.device_mode,
        log_every=LOG_EVERY,
        reduce_groups=placed.reduce_groups,
    )

    def ready() -> None:
        placed.shrink()
        if any("loss" in MEMBERS[name].asks for name in case.chain):
            session.observe(loss=1.0)

    for _ in range(LOG_EVERY):
        ready()
        optimizer.step()
    counts = []
    for _ in range(LOG_EVERY):
        ready()
        kept = held(session)
        counts.append(_count(optimizer.step))
    return mean(counts).minus(_count(bare.step)), kept


def _count(run: Callable[[], Any]) -> Counts:
    with Counter() as counter:
        run()
    return counter.counts


def _optimizer(case: Case, placed: Placed) -> torch.optim.Optimizer:
    if not case.fused:
        return Free(placed.params)
    if case.simulated:
        return FusedFree(placed.params)
    return torch.optim.AdamW(placed.params, lr=1e-6, fused=True)


def _place(way: str, shape: Shape) -> Replicate | Shard:
    if way == "shard":
        return Shard(0)
    return Shard(1) if way == "tensor" and len(shape) > 1 else Replicate()
