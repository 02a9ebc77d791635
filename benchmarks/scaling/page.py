"""The generated part of docs/scaling.md, and the same in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.scaling.evaluation import TORCH
from benchmarks.scaling.first_step import at_store
from benchmarks.scaling.machine import H100
from benchmarks.scaling.model import step_cost
from benchmarks.scaling.plan import GUARDED
from benchmarks.scaling.sizes import Mesh
from benchmarks.scaling.tables import all_tables, duration, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.evaluation import Evaluated

ANSWERS = {
    "memory": "Gradients are read once for all plugins, and one common factor is left to the fused"
    " optimizer's kernel, which then stores the gradients that it reads anyway; torch's function"
    " reads, reads again and writes.",
    "small_kernels": "Decisions are operations on single numbers, the same few hundred at every"
    " size and on any number of ranks, issued ahead of the device because none waits for the host."
    " Nothing fuses them yet.",
    "kernels_a_tensor": "One factor for all tensors never pays this. A factor for each is a kernel"
    " for each, and unit norms are several: keep experts in one tensor, or restrict the plugin with"
    " `only()`.",
    "latency": "Norms, presence, overflow and the loss of all plugins share one all-reduce over all"
    " ranks. A pipeline stage takes one for each way of its mesh and one number over the stages.",
    "payload": "One or two floats a tensor; only unit norms are long, two floats a unit.",
    "host_reads": "All that the host wants to know goes in one copy every `log_every` steps.",
}
"""What the design does about each term, where it is the first bottleneck."""


def text(evaluated: Sequence[Evaluated], *, markdown: bool) -> str:
    """Return everything that is generated."""
    runs, *others = all_tables(evaluated)
    shown = [table.markdown() if markdown else table.plain() for table in (runs, *others)]
    mark = "### " if markdown else ""
    first = "\n".join(
        [f"{mark}The first bottleneck, and what the design does", "", *said(evaluated)]
    )
    against = "\n".join([f"{mark}Where it does not help", "", *negatives(evaluated)])
    return "\n\n".join([*shown[:3], first, against, *shown[3:]])


def said(evaluated: Sequence[Evaluated]) -> list[str]:
    """Return a sentence for each term that is the first bottleneck anywhere, with where it is."""
    runs = {one.deployment.name for one in evaluated}
    lines = []
    for name, answer in ANSWERS.items():
        places: dict[str, list[str]] = {}
        for one in evaluated:
            if one.chain != TORCH and one.times.first == name:
                places.setdefault(_label(one), []).append(one.deployment.name)
        if places:
            lines.append(f"- **{words(name)}**. {answer} First for")
        for chain, found in places.items():
            where = "every run" if len(found) == len(runs) else "; ".join(found)
            lines.append(f"  - {chain}: {where}")
    return lines


def negatives(evaluated: Sequence[Evaluated]) -> list[str]:
    """Return where stablekit costs more than what it replaces, in numbers of the model."""
    torch = {one.deployment.name: one for one in evaluated if one.chain == TORCH}
    guarded = [one for one in evaluated if one.chain == GUARDED]
    dearer = [
        f"{one.deployment.name} ({duration(one.times.total)} against"
        f" {duration(torch[one.deployment.name].times.total)})"
        for one in guarded
        if one.times.total > torch[one.deployment.name].times.total
    ]
    worst = max(evaluated, key=lambda one: one.share)
    here = guarded[0].deployment.held
    host = step_cost(GUARDED, here, Mesh(), device_mode=False)
    most = max(one.deployment.mesh.ranks for one in evaluated)
    return [
        f"- {_label(guarded[0])} costs more than torch's function in: {'; '.join(dearer)}. It is"
        f" the {guarded[0].cost.kernels_once:.0f} small kernels. With `device_mode=False` it reads"
        f" {host.reads:.0f} values a step on the host instead, which is"
        f" {duration(host.reads * H100.read)} under the same assumptions and leaves the device"
        " without work meanwhile.",
        f"- The largest share of a step is that of {_label(worst)} in {worst.deployment.name}:"
        f" {worst.share:.0%}, {duration(worst.times.total)}, mostly {words(worst.times.first)}.",
        "- Under HSDP the all-reduce is over all ranks, though copies add nothing; torch's is over"
        " the shards alone. A pipeline stage reduces way by way, copies included.",
        f"- Once, at the first step, one process answers {at_store(most):,} requests of"
        f" {most:,} ranks that compare what they attached.",
        "- `quantile-clip(per_tensor=True)` sorts all past norms of all tensors in every step, and"
        " keeps 4 bytes for each: 4 kB a tensor at its default history of 1000.",
    ]


def _label(one: Evaluated) -> str:
    return " + ".join(one.chain)
