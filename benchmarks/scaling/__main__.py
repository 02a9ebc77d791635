"""``python -m benchmarks.scaling``: print the model's tables, write them, or check the model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scaling import page
from benchmarks.scaling.check import check
from benchmarks.scaling.evaluation import evaluate
from benchmarks.scaling.tables import checked_table
from benchmarks.table import write_into

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; 1 if the model is off."""
    options = _parser().parse_args(arguments)
    if options.check:
        return _check(as_json=options.json)
    evaluated = evaluate()
    if options.json:
        print(json.dumps([one.as_dict() for one in evaluated], indent=1))
    else:
        print(page.text(evaluated, markdown=False))
    if options.markdown is not None:
        write_into(options.markdown, page.text(evaluated, markdown=True))
    return 0


def _check(*, as_json: bool) -> int:
    rows = check()
    wrong = [row for row in rows if not row.holds]
    if as_json:
        print(json.dumps([{**asdict(row), "holds": row.holds} for row in rows], indent=1))
    else:
        print(checked_table(rows).plain())
        for row in wrong:
            print(f"off: {row.where}: {row.chain}: {row.term}: {row.model:g}, not {row.counted:g}")
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--check", action="store_true", help="count in 1, 2, 4 processes, compare")
    parser.add_argument("--json", action="store_true", help="print plain values")
    parser.add_argument("--markdown", type=Path, help="a page whose generated part is replaced")
    return parser


if __name__ == "__main__":
    sys.exit(main())
