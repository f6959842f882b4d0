"""The attention kernels under Triton's interpreter, level D in fp32 and fp64 on packs of any lengths.

Outputs are slices of poisoned buffers, operands slices of wider products whose other parts are NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels.varlen_attention import op
from support import attention, packs
from support.attention import TINY, TINY_BACKWARD, Pack, gradient_of, pack
from support.kernels import assert_same_bits, plain

pytestmark = pytest.mark.interpret

not_a_number = pytest.mark.filterwarnings(  # numpy's words about values that are there on purpose
    "ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice encountered:RuntimeWarning"
)
KEYS = [0, 1, 31, 63, 64, 65]


def run(of: Pack, config: dict[str, int] = TINY, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    return attention.run(of, config, multiple_of)


def run_backward(
    of: Pack,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    configs: dict[str, dict[str, int]] = TINY_BACKWARD,
    multiple_of: int = 1,
) -> list[Tensor]:
    return attention.run_backward(of, grad, out, lse, configs, multiple_of)


def check(of: Pack, config: dict[str, int] = TINY, multiple_of: int = 1) -> None:
    attention.check(of, config, TINY_BACKWARD, multiple_of)


# --- any packs ---------------------------------------------------------------------------------------------


@packs.draws(160)
@given(
    q_lengths=packs.lengths(max_tokens=200, min_length=0),
    cross=st.booleans(),
    heads=packs.heads(),
    head_dim=packs.head_dims(),
    dtype=packs.interpreted_types(),
    std=packs.stds(),
    seed=packs.seeds(),
    data=st.data(),
)
def test_any_pack(
    q_lengths: list[int],
    cross: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    std: float,
    seed: int,
    data: st.DataObject,
) -> None:
    """Self- and cross-attention, forward and backward; half of the packs with the maximum of the first tile fixed."""
    heads = heads if sum(q_lengths) * heads <= 400 else 1
    k_lengths = None
    if cross:
        k_lengths = [data.draw(st.sampled_from(KEYS)) for _ in q_lengths]
    fixed = data.draw(st.sampled_from([{}, {"FIXED_MAX_TILES": 2}]))
    odd = data.draw(st.booleans())
    check(pack(q_lengths, k_lengths, heads, head_dim, dtype, std, seed, odd=odd), TINY | fixed)


@not_a_number
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("fixed", [{}, {"FIXED_MAX_TILES": 1}])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_large_logits(head_dim: int, fixed: dict[str, int], rising: bool) -> None:
    """To +-150; where later keys are larger a fixed maximum is outgrown and the tile computed again."""
    check(pack([33, 150], None, 1, head_dim, largest_logit=150, rising=rising), TINY | fixed)


@not_a_number
@pytest.mark.parametrize("dim", [64, 72])
def test_logits_far_below_zero(dim: int) -> None:
    """A key that does not exist has logit 0 before it is masked, and would win by far."""
    of = pack([5, 33], None, 1, dim, largest_logit=150)
    of.q.abs_()
    of.k.abs_().neg_()
    check(of)


@pytest.mark.parametrize("head_dim", [8, 40, 56, 88, 104, 136])
def test_other_head_dims(head_dim: int) -> None:
    check(pack([5, 70], [33, 2], 2, head_dim), TINY | {"FIXED_MAX_TILES": 1})


@pytest.mark.parametrize("fixed", [{}, {"FIXED_MAX_TILES": 2}])
def test_whole_tiles(fixed: dict[str, int]) -> None:
    """A promise that every length is a multiple of the tiles is used: the same bits as without it."""
    of = pack([32, 64], [64, 96], 1)
    check(of, TINY | fixed, multiple_of=32)
    grad = gradient_of(of)
    results = []
    for multiple_of in (32, 16):
        out, lse = run(of, TINY | fixed, multiple_of)
        results.append([out, lse, *run_backward(of, grad, out, lse, multiple_of=multiple_of)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def test_tiles_that_are_not_square() -> None:
    of = pack([70, 1], None, 1)
    grad = gradient_of(of)
    for block_m, block_n in ((16, 64), (64, 16)):
        config = TINY | {"BLOCK_M": block_m, "BLOCK_N": block_n}
        out, lse = run(of, config)
        attention.assert_output(out, of)
        attention.assert_lse(lse, of)
        configs = TINY_BACKWARD | {"keys": config, "queries": config}
        attention.assert_gradients(run_backward(of, grad, out, lse, configs=configs), of, grad)


# --- members are apart -------------------------------------------------------------------------------------


def test_a_members_bits_do_not_depend_on_the_others() -> None:
    of = pack([40, 70, 3], [33, 100, 0])
    grad = gradient_of(of)
    out, lse = run(of)
    gradients = run_backward(of, grad, out, lse)
    rows, keys = slice(40, 110), slice(33, 133)
    alone = Pack(
        of.q[rows], of.k[keys], of.v[keys], attention.cumulative([70]), attention.cumulative([100]), 70, 100, of.scale
    )  # fmt: skip
    out_alone, lse_alone = run(alone)
    assert_same_bits(out[rows], out_alone)
    assert_same_bits(lse[:, rows], lse_alone)
    slices = (rows, keys, keys)
    for a, b, part in zip(gradients, run_backward(alone, grad[rows], out_alone, lse_alone), slices, strict=True):
        assert_same_bits(a[part], b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@not_a_number
def test_what_is_not_a_number_stays_in_its_member(bad: float) -> None:
    of = pack([40, 50], [35, 70])
    grad = gradient_of(of)
    clean, clean_lse = run(of)
    clean_gradients = run_backward(of, grad, clean, clean_lse)
    of.k[:35] = bad
    of.v[:35] = bad
    out, lse = run(of)
    assert_same_bits(out[40:], clean[40:])
    assert out[:40].isnan().all()
    for a, b, part in zip(run_backward(of, grad, out, lse), clean_gradients, (40, 35, 35), strict=True):
        assert_same_bits(a[part:], b[part:])


def test_every_run_has_the_same_bits() -> None:
    of = pack([50, 64, 1])
    grad = gradient_of(of)
    runs = []
    for _ in range(2):
        out, lse = run(of)
        runs.append([out, lse, *run_backward(of, grad, out, lse)])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


# --- what a CUDA call runs ---------------------------------------------------------------------------------


def arguments(of: Pack, multiple_of: int = 1) -> tuple[Any, ...]:
    return *of, multiple_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operations_launch_what_the_reference_means(dtype: torch.dtype) -> None:
    """The frozen configuration, an expanded gradient, one of the log-sum-exp, an empty pack."""
    of = pack([3, 0, 66], [5, 2, 64], 2, 24, dtype)
    out, lse = op._launch_varlen_attention(*arguments(of))
    expected_out, expected_lse = plain(op._varlen_attention)(*arguments(of))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, expected_out, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **tolerance)
    grads = (torch.ones(1, 1, 1, dtype=dtype).expand(69, 2, 24), gradient_of(of).transpose(0, 2).transpose(0, 2))
    generator = torch.Generator().manual_seed(4)
    of_lse = torch.randn(69, 2, generator=generator, dtype=dtype).T
    for grad in grads:
        for grad_lse in (None, of_lse):
            tensors = (grad, grad_lse, *of[:3], out, lse, *of[3:], 1)
            got = op._launch_varlen_attention_backward(*tensors)
            for a, b in zip(got, plain(op._varlen_attention_backward)(*tensors), strict=True):
                torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), [([], []), ([0, 0], [0, 0]), ([0], [5]), ([5], [0])])
def test_packs_with_nothing_in_them(q_lengths: list[int], k_lengths: list[int]) -> None:
    of = pack(q_lengths, k_lengths)
    out, lse = op._launch_varlen_attention(*arguments(of))
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    got = op._launch_varlen_attention_backward(torch.ones_like(out), None, *of[:3], out, lse, *of[3:], 1)
    for x, like in zip(got, of[:3], strict=True):
        assert x.shape == like.shape
        assert not x.any()
