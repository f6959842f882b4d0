"""Run all mutants, or those whose name contains the argument: ``python -m mutants [--only TEXT]``, in ``tests/``.

Leaves with 1 where one survives that should not, or where fewer than 95 % are killed.
"""

from __future__ import annotations

import argparse
import sys
import time

from . import catalogue
from .mutant import Outcome, outcome, passes_unchanged

LEAST_KILLED = 0.95


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mutants")
    parser.add_argument("--only", default="", help="part of the names")
    mutants = [m for m in catalogue.MUTANTS if parser.parse_args().only in m.name]
    if not mutants:
        print("no mutant has such a name", file=sys.stderr)
        return 2
    for tests, interpret in sorted({(m.tests, m.interpret) for m in mutants}):
        if not passes_unchanged(tests, interpret):
            print(f"the tests fail without any mutant: {' '.join(tests)}", file=sys.stderr)
            return 2
    killed, unexplained = 0, []
    for mutant in mutants:
        began = time.perf_counter()
        found = outcome(mutant)
        killed += found is Outcome.KILLED
        if found is Outcome.SURVIVED and mutant.survives is None:
            unexplained.append(mutant.name)
        note = f" ({mutant.survives})" if found is Outcome.SURVIVED and mutant.survives else ""
        print(f"{found.value:8}  {time.perf_counter() - began:5.1f} s  {mutant.name}{note}", flush=True)
    print(f"{killed} of {len(mutants)} killed; unexplained: {', '.join(unexplained) or 'none'}")
    return 1 if unexplained or killed < LEAST_KILLED * len(mutants) else 0


if __name__ == "__main__":
    sys.exit(main())
