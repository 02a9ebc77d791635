"""Rows: host reads of chains that only clip, as an accelerator would see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name for it

import stablekit
from benchmarks.table import Row
from benchmarks.workloads import TINY, Free, shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STEPS = 3
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero")
_CLIPPERS = ["global-norm", "autoclip", "quantile-clip", "zclip", "adagc", "agc"]


@final
class HostReads(TorchDispatchMode):
    """Counts operations that need a value of a tensor on the host.

    A read of a meta tensor raises as well, since there is no value; so a chain that runs has none,
    and this count says it in a number.
    """

    count: int = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401 - torch's signature
        args: Any = (),  # noqa: ANN401 - torch's signature
        kwargs: Any = None,  # noqa: ANN401 - torch's signature
    ) -> Any:  # noqa: ANN401 - torch's signature
        """Count and pass on."""
        kwargs = kwargs or {}
        leaves = func.overloadpacket.__name__ == "_to_copy" and kwargs.get("device") is not None
        to_host = leaves and torch.device(kwargs["device"]).type == "cpu" and args[0].is_meta
        if func.overloadpacket.__name__ in _READS or to_host:
            self.count += 1
        return func(*args, **kwargs)


def rows() -> Iterator[Row]:
    """Count host reads of each clipper and of all together, on meta tensors in device mode."""
    known = stablekit.available()
    clippers = [name for name in _CLIPPERS if name in known]
    yield Row(
        f"host reads in {_STEPS} steps of {', '.join(clippers)}: each alone, then all together",
        sum(_host_reads([name]) for name in clippers) + _host_reads(clippers),
        "tiny on meta",
        target=0,
        unit="reads",
    )


def _host_reads(plugins: list[str]) -> int:
    params = [Parameter(torch.empty(shape, device="meta")) for shape in shapes(TINY)]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = Free(params)
    # Metrics and events reach the host in one copy every log_every steps; that is left out.
    stablekit.attach(optimizer, *plugins, device_mode=True, log_every=_STEPS + 1)
    reads = HostReads()  # type: ignore[no-untyped-call] # torch's class has no annotations
    with reads:
        _repeat(optimizer.step, _STEPS)
    return reads.count


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()
