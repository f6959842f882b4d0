"""All mutants, by operation."""

from __future__ import annotations

from . import ode_step, rope2d, varlen_attention
from .mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*rope2d.MUTANTS, *varlen_attention.MUTANTS, *ode_step.MUTANTS)
