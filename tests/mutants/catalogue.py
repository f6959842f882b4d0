"""All mutants, by operation."""

from __future__ import annotations

from . import adamw, cascade, modulate, ode_step, rope2d, varlen_attention
from .mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *rope2d.MUTANTS,
    *cascade.MUTANTS,
    *modulate.MUTANTS,
    *ode_step.MUTANTS,
    *varlen_attention.MUTANTS,
    *adamw.MUTANTS,
)
