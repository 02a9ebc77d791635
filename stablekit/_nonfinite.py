"""Finding and naming gradients that are not finite; what to do about them is for plugins."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from stablekit._layout import parameters_of
from stablekit.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from stablekit._ledger import Ledger
    from stablekit._round import Round

_NAMED = 16
_LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""What sums of squares in float32 can hold."""


def watch(moment: Round, ledger: Ledger) -> None:
    """Emit "nonfinite" where the global norm is NaN or infinite; on a device it arrives later."""
    total = ledger.raw_norm()
    if not moment.session.host:
        total = torch.where(moment.ok, total, 0.0)  # what a GradScaler found has its own event
        moment.session.mail.send(partial(_report, moment, None), total, ledger.raw_norms())
    elif not math.isfinite(total.item()):
        has_infinite = _tensors_with_infinite_elements(ledger)
        _report(moment, has_infinite, total.item(), ledger.raw_norms().tolist())


def is_in_any(moment: Round, optimizers: Sequence[Optimizer]) -> bool:
    """Tell whether gradients of any of these optimizers are not finite; reads the host."""
    own = {id(param) for param in parameters_of(optimizers)}
    norms = [] if moment.ledger is None else moment.ledger.raw_norms().tolist()
    pairs = zip(moment.params, norms, strict=False)
    return any(id(param) in own and not math.isfinite(norm) for param, norm in pairs)


def refuse(moment: Round, ledger: Ledger) -> None:
    """Stop a closure whose later evaluation is not finite: there is no way back from the middle.

    Raises:
        NonFiniteError: The global norm is NaN or infinite.
    """
    if moment.session.dry_run:
        return
    moment.session.mail.send(partial(_stop, moment.number, moment.evaluation), ledger.raw_norm())


def _stop(number: int, evaluation: int, total: float) -> None:
    if not math.isfinite(total):
        raise NonFiniteError(
            f"evaluation {evaluation + 1} of the closure in step {number} has gradients that are"
            f" not finite (norm {total}); only the first evaluation of a step can be skipped."
            " Lower the learning rate or bound the line search."
        )


def _tensors_with_infinite_elements(ledger: Ledger) -> list[bool]:
    """Tell a real Inf from a norm that overflowed; agreed between the ranks that share a tensor."""
    flags = [data is not None and bool(data.isinf().any()) for data in ledger.memory.data]
    shared = torch.tensor(flags, dtype=torch.float32, device=ledger.layout.device)
    for span in ledger.layout.spans:
        shared = shared.index_copy(0, span.index, span.largest(shared[span.index]))
    return [bool(flag) for flag in shared.tolist()]


def _report(
    moment: Round, has_infinite: list[bool] | None, total: float, norms: list[float]
) -> None:
    if math.isfinite(total):
        return
    names = moment.layout.names
    nan = [i for i, norm in enumerate(norms) if math.isnan(norm)]
    infinite = [i for i, norm in enumerate(norms) if math.isinf(norm)]
    real = infinite if has_infinite is None else [i for i in infinite if has_infinite[i]]
    if nan:
        kind, culprits = "nan", nan + real
    elif real:
        kind, culprits = "inf", real
    elif infinite or not _is_elsewhere(moment, norms):
        kind, culprits = "overflow", infinite or _largest(norms)
    else:
        kind, culprits = "nan" if math.isnan(total) else "inf", []
    said = ", ".join(names[i] for i in culprits[:3]) + (", ..." if len(culprits) > 3 else "")
    where = f"in {len(culprits)} of {len(names)} tensors: {said}" if culprits else "on other ranks"
    moment.emit(
        "nonfinite",
        "",
        f"gradient norm is {total} ({kind}) {where}",
        True,
        [names[i] for i in culprits[:_NAMED]],
        {"kind": kind, "count": len(culprits)},
    )


def _is_elsewhere(moment: Round, norms: list[float]) -> bool:
    """Tell whether finite norms do not make up a total that is not: other ranks have more."""
    is_shared = bool(moment.layout.spans or moment.session.reduce_groups)
    return is_shared and math.hypot(*norms) < _LARGEST_NORM


def _largest(norms: list[float]) -> list[int]:
    return sorted(range(len(norms)), key=lambda i: norms[i], reverse=True)[:1]
