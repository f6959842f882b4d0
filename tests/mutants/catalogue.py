"""All mutants, by operation."""

from __future__ import annotations

from . import rope2d
from .mutant import Mutant

MUTANTS: tuple[Mutant, ...] = rope2d.MUTANTS
