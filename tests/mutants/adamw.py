"""Mutants of adamw."""

from __future__ import annotations

from .mutant import Mutant

TESTS = "tests/kernels/test_adamw_interpret.py"
KERNELS = "adamw/kernels.py"


def tests(names: str) -> tuple[str, ...]:
    """Those with such a name, without the longest."""
    return TESTS, "-k", f"({names}) and not many"


MUTANTS = (
    Mutant("adamw: a chunk's last block is one value too long", KERNELS, "places, places < count, numbers_ptr,", "places, places <= count, numbers_ptr,", tests("test_update")),
    Mutant("adamw: a block left out between the two loops", KERNELS, "for block in range(whole, blocks):", "for block in range(whole + 1, blocks):", tests("test_update")),
    Mutant("adamw: the second moment of the gradient that is not clipped", KERNELS, "square = g * g", "square = g * g / tl.load(numbers_ptr + 1)", tests("test_update")),
    Mutant("adamw: the average moves towards the parameter of before", KERNELS, "_moved(average, tl.load(numbers_ptr + 8), p, APART)", "_moved(average, tl.load(numbers_ptr + 8), p + kept, APART)", tests("test_update")),
    Mutant("adamw: parameter rounded twice", KERNELS, "p = p - (kept + tl.div_rn(", "p = (p - kept) - (tl.div_rn(", tests("test_update")),
    Mutant("adamw: eps inside of the root's scale", KERNELS, "root + tl.load(numbers_ptr + 6)", "root + tl.load(numbers_ptr + 5)", tests("test_update")),
    Mutant("adamw: copies in the averages' place", KERNELS, "(OTHERS + AVERAGED) * tensors", "OTHERS * tensors", tests("test_update")),
    Mutant("adamw: a step that does not count is taken", KERNELS, "applied = tl.load(numbers_ptr) != 0", "applied = tl.load(numbers_ptr) >= 0", tests("does_not_count")),
    Mutant("adamw: gradients of a skipped step are kept", KERNELS, "for block in range(blocks, tl.cdiv(count, BLOCK)):", "for block in range(tl.cdiv(count, BLOCK), blocks):", tests("does_not_count")),
    Mutant("adamw: steps counted from 0 in the bias", KERNELS, "_power(one * beta2, taken + 1)", "_power(one * beta2, taken)", tests("test_numbers")),
    Mutant("adamw: an infinite norm counts", KERNELS, "applied = clip * norm < LARGEST_NORM", "applied = norm == norm", tests("test_numbers")),
    Mutant("adamw: skipped steps in a row are not forgotten", KERNELS, "(tl.load(counters_ptr + 2) + 1) * (1 - applied)", "tl.load(counters_ptr + 2) + 1 - applied", tests("test_numbers")),
    Mutant("adamw: the average's warm-up is its limit", KERNELS, "tl.where(ema_decay < decay, one * ema_decay, decay)", "one * ema_decay", tests("test_numbers")),
    Mutant("adamw: the last chunk's sum is left out", KERNELS, "partial_ptr=partial, norm_ptr=norm, count=count,", "partial_ptr=partial, norm_ptr=norm, count=max(count - 1, 1),", tests("test_norm")),
    Mutant("adamw: a table whose tensors have moved is taken", "adamw/table.py", "if torch.equal(found, self.known):", "if True:", tests("bits_of_the_plain or functionalization")),
)  # fmt: skip
