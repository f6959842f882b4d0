"""A mutant, and how it is put to the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "triton_kernels"
TIMEOUT = 900


class Outcome(Enum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One small change.

    Attributes:
        name: ``"op: what is wrong"``, unique.
        file: relative to the package of kernels, ``"rope2d/forward.py"``.
        before: text that occurs in the file ``times`` times.
        after: what takes its place, everywhere.
        tests: the tests that must notice, as pytest's arguments.
        interpret: the tests run under Triton's interpreter.
        survives: why no test can notice, for a mutant that computes the same after all; None for all others.
        times: how often ``before`` occurs.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    interpret: bool = True
    survives: str | None = None
    times: int = 1

    def apply(self, package: Path) -> None:
        """Change the copy of the package that is at ``package``.

        Raises:
            ValueError: the text is not there as often as said, so the list of mutants is out of date.
        """
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.before)) != self.times:
            raise ValueError(f"{self.name}: got {count} times {self.before!r} in {self.file}, expected {self.times}")
        path.write_text(source.replace(self.before, self.after), encoding="utf-8")


def outcome(mutant: Mutant) -> Outcome:
    """Run the mutant's tests against it.

    Raises:
        ValueError: the mutant does not apply.
        RuntimeError: pytest did not get as far as running tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "triton_kernels"
        shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.apply(copy / "pixelflow_kernels")
        return _run(mutant.tests, mutant.interpret, copy)


def passes_unchanged(tests: Sequence[str], interpret: bool) -> bool:
    """The tests pass on the kernels as they are: otherwise every mutant would seem killed."""
    return _run(tests, interpret, KERNELS) is Outcome.SURVIVED


def _run(tests: Sequence[str], interpret: bool, kernels: Path) -> Outcome:
    others = [str(ROOT / name) for name in ("engine", "training", "benchmarks")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(kernels), *others]),
        "TRITON_INTERPRET": "1" if interpret else "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIXELFLOW_SHRINK": "0",  # a failing example need not be the smallest
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    match done.returncode:
        case 0:
            return Outcome.SURVIVED
        case code if code == 1 or code < 0:  # a test failed, or the interpreter died of a wild pointer
            return Outcome.KILLED
        case code:
            raise RuntimeError(
                f"pytest {' '.join(tests)} left with {code}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
