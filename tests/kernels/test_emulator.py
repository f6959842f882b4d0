"""The PTX emulator itself: it computes what PyTorch does, and reports each kind of fault, in kernels made for that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from support.compiled import compiles
from support.kernels import POISON, assert_filled, assert_same_bits, poisoned, random_bits
from support.ptx import EmulationError, arithmetic, driver, emulated
from support.reference_models import seeded

pytestmark = [
    compiles,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
by_arch = pytest.mark.parametrize("arch", [80, 90])


@triton.jit
def _double(x_ptr, out_ptr, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count if MASKED else at >= 0
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask), mask)


@triton.jit
def _hinted(x_ptr, out_ptr, first, BLOCK: tl.constexpr):
    """From an element on that is said to be a multiple of 16."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + tl.multiple_of(first + at, 16)))


@triton.jit
def _reverse(x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Through memory: what one thread writes another one reads."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    swapped = tl.load(out_ptr + BLOCK - 1 - at)
    tl.debug_barrier()
    tl.store(out_ptr + at, swapped)


@triton.jit
def _neighbour(x_ptr):
    """Programs read what the next one writes."""
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k)
    b = tl.trans(tl.load(b_ptr + n[:, None] * K + k)) if TRANSPOSED else tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m[:, None] * N + n, tl.dot(a, b, input_precision="tf32"))


@triton.jit
def _sums(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """A loop of a length of its own in every program."""
    i, total = tl.program_id(0), tl.zeros([BLOCK], tl.float32)
    for step in range(count + i):
        total += tl.load(x_ptr + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + i * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def _apply(x_ptr, y_ptr, z_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    if NAME == "fma":
        out = tl.fma(x, y, z)
    elif NAME == "divide":
        out = tl.div_rn(x, y)
    elif NAME == "root":
        out = tl.sqrt_rn(x)
    elif NAME == "larger":
        out = tl.maximum(x, y)
    elif NAME == "bf16":
        out = x.to(tl.bfloat16).to(tl.float32)
    elif NAME == "fp16":
        out = x.to(tl.float16).to(tl.float32)
    else:
        out = x * y - z
    tl.store(out_ptr + at, out)


# --- it computes --------------------------------------------------------------------------------------------


@by_arch
@pytest.mark.parametrize("count", [1, 127, 128, 1000])
def test_all_elements_and_no_others(arch: int, count: int) -> None:
    x = torch.randn(count, generator=seeded(count))
    buffer, out = poisoned(count)
    with emulated(arch) as gpu:
        _double[(triton.cdiv(count, 128),)](x, out, count, MASKED=True, BLOCK=128)
    assert gpu.launched == {"_double": 1}
    assert_filled(buffer, out)
    assert_same_bits(out, 2 * x)


@by_arch
@pytest.mark.parametrize("name", ["divide", "root", "larger", "bf16", "fp16"])
def test_arithmetic_has_the_bits_of_pytorch(arch: int, name: str) -> None:
    """Correctly rounded operations, on values of any bits."""
    x, y, z = (random_bits(4096, dtype=torch.float32, generator=seeded(seed)) for seed in (1, 2, 3))
    out = torch.empty_like(x)
    with emulated(arch):
        _apply[(4,)](x, y, z, out, NAME=name, BLOCK=1024)
    expected = {
        "divide": x / y,
        "root": x.double().sqrt().float(),  # PyTorch's float32 roots are not to the nearest on every CPU
        "larger": torch.fmax(x, y),
        "bf16": x.bfloat16().float(),
        "fp16": x.half().float(),
    }[name]
    if name == "larger":  # PyTorch does not say which zero is larger
        expected = torch.where((x == 0) & (y == 0), torch.where(x.signbit() & y.signbit(), -0.0, 0.0), expected)
    assert_same_bits(out, expected)


@by_arch
def test_fused_products_round_once(arch: int) -> None:
    """Against whole numbers of Python, where a product and a sum would round twice."""
    drawn = torch.randint(-(2**23), 2**23, (3, 4096), generator=seeded(4)).double()
    x, y, z = (drawn * 2.0 ** torch.tensor([[-20.0], [-3.0], [-24.0]], dtype=torch.float64)).float()
    out = torch.empty_like(x)
    with emulated(arch):
        _apply[(4,)](x, y, z, out, NAME="fma", BLOCK=1024)
    exact = [(int(a) * int(b) * 2) + int(c) for a, b, c in drawn.T.tolist()]  # in units of 2^-24
    assert_same_bits(out, torch.tensor(np.array([_nearest(n) for n in exact], np.float32)) * 2.0**-24)
    assert (out != x * y + z).any(), "none of these values tells one rounding from two"


def _nearest(n: int) -> float:
    """A whole number rounded to 24 bits, ties to even."""
    shift = max(abs(n).bit_length() - 24, 0)
    half, rest = divmod(abs(n), 1 << shift)
    half += 2 * rest > 1 << shift or (2 * rest == 1 << shift and half % 2)
    return float((half << shift) * (1 if n >= 0 else -1))


@by_arch
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k", "warps"), [(16, 16, 32, 1), (128, 32, 16, 8), (64, 128, 128, 4)])
def test_matrix_products(arch: int, dtype: torch.dtype, transposed: bool, m: int, n: int, k: int, warps: int) -> None:
    """Every layout of operands: whole numbers, so that the product is exact in any order."""
    a = torch.randint(-8, 9, (m, k), generator=seeded(5)).to(dtype)
    b = torch.randint(-8, 9, (n, k) if transposed else (k, n), generator=seeded(6)).to(dtype)
    buffer, out = poisoned(m, n, dense=True)
    with emulated(arch):
        _product[(1,)](a, b, out, M=m, N=n, K=k, TRANSPOSED=transposed, num_warps=warps)
    assert_filled(buffer, out)
    assert_same_bits(out, a.float() @ (b.T if transposed else b).float())


@by_arch
def test_programs_go_their_own_ways(arch: int) -> None:
    x = torch.randint(-99, 99, (12, 64), generator=seeded(7)).float()
    out = torch.full((5, 64), torch.nan)
    with emulated(arch):
        _sums[(5,)](x, out, 3, BLOCK=64)
    assert_same_bits(out, torch.stack([x[: 3 + i].sum(0) for i in range(5)]))


@by_arch
def test_a_barrier_orders_what_threads_exchange(arch: int) -> None:
    x, out = torch.randn(512, generator=seeded(8)), torch.empty(512)
    with emulated(arch):
        _reverse[(1,)](x, out, BLOCK=512, BARRIER=True)
    assert_same_bits(out, x.flip(0))


def test_approximations_are_off_but_no_further_than_documented() -> None:
    x = torch.randn(100_000, generator=seeded(9)).numpy()
    for got, exact, bound in (
        (arithmetic.exp2_approximate(x), np.exp2(x.astype(np.float64)), 2.0**-22),
        (arithmetic.rsqrt_approximate(x * x), 1 / np.abs((x * x).astype(np.float64)) ** 0.5, 2.0**-22),
        (arithmetic.divide_approximate(x, x[::-1]), x / x[::-1].astype(np.float64), 2.0**-21),
    ):
        error = np.abs(got / exact - 1).max()
        assert 2.0**-24 < error <= bound
    y = torch.randn(1000, generator=seeded(10), dtype=torch.float64).numpy()
    gross = arithmetic.reciprocal_gross(y)
    assert not (gross.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
    assert 2.0**-21 < np.abs(gross * y - 1).max() < 2.0**-19
    edges = np.array([0.0, -0.0, 1e-310, -1e-310, np.inf, -np.inf, np.nan, 2.0**1023, -2.0])
    with np.errstate(divide="ignore"):
        found = arithmetic.reciprocal_gross(edges)
    expected = np.array([np.inf, -np.inf, np.inf, -np.inf, 0.0, -0.0, np.nan, 0.0, -0.5])
    assert_same_bits(torch.from_numpy(found), torch.from_numpy(expected))


# --- it reports ----------------------------------------------------------------------------------------------


@by_arch
def test_an_access_beyond_a_tensor(arch: int) -> None:
    x, out = torch.randn(100), torch.zeros(128)
    with emulated(arch), pytest.raises(EmulationError, match=r"_double: .*memory of no tensor.*ld\.global"):
        _double[(1,)](x[:0].new_empty(4), out, 128, MASKED=False, BLOCK=128)
    with emulated(arch), pytest.raises(EmulationError, match=r"memory of no tensor.*test_emulator\.py"):
        _double[(1000,)](x, out, 100, MASKED=False, BLOCK=128)


@by_arch
def test_a_hint_that_is_not_true(arch: int) -> None:
    """Vector loads follow from the hint; on a GPU they fail, and under the interpreter nothing happens."""
    x, out = torch.randn(600, generator=seeded(10)), torch.empty(512)
    with emulated(arch):
        _hinted[(1,)](x, out, 32, BLOCK=512)
    assert_same_bits(out, x[32:544])
    with emulated(arch), pytest.raises(EmulationError, match=r"not aligned.*v4"):
        _hinted[(1,)](x, out, 34, BLOCK=512)


@by_arch
def test_programs_that_depend_on_their_order(arch: int) -> None:
    with emulated(arch), pytest.raises(EmulationError, match="_neighbour: programs access what another one writes"):
        _neighbour[(8,)](torch.arange(9.0))


@by_arch
def test_threads_that_depend_on_their_order(arch: int) -> None:
    x, out = torch.randn(512, generator=seeded(8)), torch.full((512,), POISON[torch.int32][1]).float()
    with emulated(arch), pytest.raises(EmulationError, match="warps access what another one writes"):
        _reverse[(1,)](x, out, BLOCK=512, BARRIER=False)


@by_arch
def test_too_much_shared_memory(arch: int) -> None:
    """Triton's own check, with the limits of the architecture."""
    a, b, out = torch.zeros(16, 2048), torch.zeros(2048, 16), torch.zeros(16, 16)
    with emulated(arch), pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        _product[(1,)](a, b, out, M=16, N=16, K=2048, TRANSPOSED=False)


def test_an_instruction_that_is_not_known() -> None:
    from support.ptx.control import prepare
    from support.ptx.text import parse

    head = ".visible .entry k(\n.param .u64 k_param_0\n)\n.reqntid 32\n{\n"
    with pytest.raises(EmulationError, match=r"unknown instruction nosuch\.b32.*line 3"):
        prepare(parse(head + ".reg .b32 %r<2>;\nnosuch.b32 %r1, 0;\nret;\n}\n"))


def _run_text(path: Path, body: str) -> torch.Tensor:
    """Run PTX with 32 threads; ``%rd1`` is where each may store a word."""
    head = ".visible .entry k(\n.param .u64 k_param_0\n)\n.reqntid 32\n{\n"
    head += ".reg .b16 %rs<4>;\n.reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n.reg .pred %p<2>;\n"
    head += "mov.u32 %r1, %tid.x;\nld.param.b64 %rd2, [k_param_0];\nmad.wide.u32 %rd1, %r1, 4, %rd2;\n"
    path.write_text(head + body + "ret;\n}\n")
    out = torch.zeros(32, dtype=torch.int32)
    driver.emulate(str(path), [("*i32", out)], (1, 1, 1), 0)
    return out


def test_packed_words_do_not_carry_into_each_other(tmp_path: Path) -> None:
    body = "mul.lo.u32 %r2, %r1, 65537;\nadd.s16x2 %r3, %r2, 2147483647;\nst.global.b32 [%rd1], %r3;\n"
    found = _run_text(tmp_path / "packed", body).to(torch.int64) & 0xFFFFFFFF
    thread = torch.arange(32)
    assert torch.equal(found, ((0x7FFF + thread) << 16) | ((0xFFFF + thread) & 0xFFFF))


def test_a_part_that_nothing_writes_has_any_bits(tmp_path: Path) -> None:
    """The compiler leaves halves undefined that it does not use; one that is written too late is a fault."""
    joined = "cvt.u16.u32 %rs1, %r1;\nmov.b32 %r2, {%rs2, %rs1};\n"
    out = _run_text(tmp_path / "used", joined + "st.global.b32 [%rd1], %r2;\n")
    assert (out >> 16).tolist() == list(range(32))
    assert len(set((out & 0xFFFF).tolist())) == 32
    with pytest.raises(EmulationError, match="read before it is written"):
        _run_text(tmp_path / "late", joined + "mov.b16 %rs2, 0;\n")
