"""The list of broken kernels is in order; a fixed few of them are put to the test (``make mutants`` does all)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mutants.catalogue import MUTANTS
from mutants.mutant import KERNELS, Mutant, Outcome, outcome

SAMPLE = (
    "rope2d: column and row swapped",
    "rope2d: backward: sum overwritten",
    "cascade: seed's high word off by a bit",
    "modulate: residual's tail not stored",
    "varlen_attention: row sum not rescaled",
)


def test_every_mutant_changes_what_is_there(tmp_path: Path) -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        source = (KERNELS / "pixelflow_kernels" / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.before) == mutant.times, mutant.name
        changed = source.replace(mutant.before, mutant.after)
        assert changed != source, mutant.name
        compile(changed, mutant.file, "exec")


def test_a_mutant_that_is_out_of_date_is_refused(tmp_path: Path) -> None:
    shutil.copytree(KERNELS / "pixelflow_kernels" / "rope2d", tmp_path / "rope2d")
    stale = Mutant("rope2d: stale", "rope2d/forward.py", "no such text", "", ())
    with pytest.raises(ValueError, match=r"got 0 times 'no such text' in rope2d/forward\.py, expected 1"):
        stale.apply(tmp_path)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_broken_kernel_is_noticed(name: str) -> None:
    (mutant,) = [m for m in MUTANTS if m.name == name]
    assert outcome(mutant) is Outcome.KILLED
