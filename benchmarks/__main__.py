"""``python -m benchmarks``: measure, print the table, and write it into the page if asked to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine, table
from benchmarks.effort import Effort
from benchmarks.suite import ROWS, as_json, run_apart, run_here
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a target is missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu knows one thread only; give --threads 1 with it")
    effort = Effort(quick=options.quick, cpu_clock=options.clock == "cpu")
    if options.json:
        (threads,) = options.threads
        print(as_json(list(run_here(options.rows, options.workloads, threads, effort))))
        return 0
    if machine.is_busy():
        print("The machine is busy; expect noise, most of all at 2 threads.", file=sys.stderr)
    apart = [run_apart(options.rows, options.workloads, n, effort) for n in options.threads]
    rows = [row for several in apart for row in several]
    made_on = f"{machine.describe()}, {options.clock} clock"
    print(f"{made_on}\n\n{table.plain(rows)}")
    if options.markdown is not None:
        text = f"Measured on: {made_on}.\n\n{table.markdown(rows)}"
        table.write_into(options.markdown, text)
    return int(any(row.met is False for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions; figures mean little")
    parser.add_argument("--threads", type=_list_of(int), default=[1, 2], help="1,2")
    parser.add_argument("--rows", type=_list_of(str, ROWS), default=list(ROWS), help=",".join(ROWS))
    parser.add_argument(
        "--workloads",
        type=_list_of(str, tuple(WORKLOADS)),
        default=list(WORKLOADS),
        help=",".join(WORKLOADS),
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: for a machine that is busy with other work, with --threads 1",
    )
    parser.add_argument("--markdown", type=Path, help="a page whose table is replaced")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    return parser


def _list_of(kind: type, choices: Sequence[object] = ()) -> Callable[[str], list[object]]:
    def parse(text: str) -> list[object]:
        values = [kind(part) for part in text.split(",")]
        unknown = [value for value in values if choices and value not in choices]
        if unknown:
            known = ", ".join(map(str, choices))
            raise argparse.ArgumentTypeError(f"unknown: {unknown}; known are {known}")
        return values

    return parse


if __name__ == "__main__":
    sys.exit(main())
