"""The compiled attention kernels on a device: level D in every type, packs of thousands of tokens, 1,000 equal runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_kernels.varlen_attention import backends, op, varlen_attention
from support import attention
from support.attention import Pack, check, gradient_of, pack, run, run_backward
from support.kernels import assert_same_bits

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
# Each line is compiled anew, so only bf16 gets every head dim.
HEADS_DIMS_TYPES = [
    *[(heads, dim, torch.bfloat16) for heads, dim in ((16, 72), (16, 64), (2, 80), (2, 96), (2, 128), (3, 24))],
    *[(heads, dim, torch.bfloat16) for heads, dim in ((1, 8), (2, 16), (1, 40), (1, 56), (1, 256))],
    *[(heads, dim, torch.float16) for heads, dim in ((16, 72), (2, 64))],
    *[(heads, dim, torch.float32) for heads, dim in ((4, 72), (3, 24))],
]
SELF: dict[str, list[int]] = {
    "ragged": [1, 63, 64, 65, 0, 600, 127, 128, 129],
    "whole tiles": [256, 256, 1024],
    "long": [2048 + 128, 2300],  # long enough for a fixed maximum
    "one token": [1],
    "empty": [],
}


def on_device(*arguments: Any, **options: Any) -> Pack:
    return pack(*arguments, **options).to("cuda")


SHORTCUTS = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.fixture(autouse=True)
def plain_products_in_full() -> Iterator[None]:
    """What the kernels are compared with is not computed in TF32 nor summed in less than fp32.

    Not by ``monkeypatch``, which would delete what is no attribute of the object itself.
    """
    settings = torch.backends.cuda.matmul
    before = [getattr(settings, name) for name in SHORTCUTS]
    for name in SHORTCUTS:
        setattr(settings, name, False)
    yield
    for name, value in zip(SHORTCUTS, before, strict=True):
        setattr(settings, name, value)


# --- level D -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", SELF.values(), ids=SELF)
@pytest.mark.parametrize(("heads", "dim", "dtype"), HEADS_DIMS_TYPES)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_self_attention(lengths: list[int], heads: int, dim: int, dtype: torch.dtype, std: float) -> None:
    check(on_device(lengths, None, heads, dim, dtype, std))


@pytest.mark.parametrize(("heads", "dim"), [(16, 72), (1, 24)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("odd", [False, True])
def test_cross_attention(heads: int, dim: int, dtype: torch.dtype, odd: bool) -> None:
    """Text of up to 512 tokens, no text, and more keys than a fixed maximum needs."""
    check(on_device([1024, 64, 7, 256, 0, 40], [77, 512, 0, 1, 5, 2500], heads, dim, dtype, odd=odd))


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("largest", [12.0, 150.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 72])
def test_large_logits(dim: int, dtype: torch.dtype, largest: float, rising: bool) -> None:
    """Where later keys are larger, a maximum fixed at the first tile is outgrown and the tile computed again."""
    check(on_device([2304, 100], None, 2, dim, dtype, largest_logit=largest, rising=rising))


@pytest.mark.parametrize("dim", [64, 72])
def test_logits_far_below_zero(dim: int) -> None:
    """A key that does not exist has logit 0 before it is masked, and would win by far."""
    of = on_device([5, 333], None, 2, dim, torch.bfloat16, largest_logit=150)
    of.q.abs_()
    of.k.abs_().neg_()
    check(of)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lengths", [[64] * 8, [256, 256], [4096, 1024, 256, 64]], ids=["64", "256", "mixed"])
def test_a_promise_of_whole_tiles_changes_no_bits(lengths: list[int], dtype: torch.dtype) -> None:
    of = on_device(lengths, None, 2, 72, dtype)
    grad = gradient_of(of)
    results = []
    for multiple_of in (1, math.gcd(*lengths)):
        out, lse = run(of, multiple_of=multiple_of)
        results.append([out, lse, *run_backward(of, grad, out, lse, multiple_of=multiple_of)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# --- members are apart (level C) ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 64, 65, 256, 2304])
@pytest.mark.parametrize("dim", [64, 72])
def test_a_members_bits_do_not_depend_on_the_others(length: int, dim: int) -> None:
    of = on_device([300, length, 1100], None, 2, dim, torch.bfloat16)
    grad = gradient_of(of)
    out, lse = run(of)
    gradients = run_backward(of, grad, out, lse)
    part = slice(300, 300 + length)
    cu_seqlens = attention.cumulative([length]).cuda()
    alone = Pack(of.q[part], of.k[part], of.v[part], cu_seqlens, cu_seqlens, length, length, of.scale)
    out_alone, lse_alone = run(alone)
    assert_same_bits(out[part], out_alone)
    assert_same_bits(lse[:, part], lse_alone)
    for a, b in zip(gradients, run_backward(alone, grad[part], out_alone, lse_alone), strict=True):
        assert_same_bits(a[part], b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_member(bad: float) -> None:
    of = on_device([140, 250], None, 2, 72, torch.bfloat16)
    grad = gradient_of(of)
    clean, clean_lse = run(of)
    clean_gradients = run_backward(of, grad, clean, clean_lse)
    of.k[:140] = bad
    of.v[:140] = bad
    out, lse = run(of)
    assert out[:140].isnan().all()
    assert_same_bits(out[140:], clean[140:])
    for a, b in zip(run_backward(of, grad, out, lse), clean_gradients, strict=True):
        assert_same_bits(a[140:], b[140:])


# --- reproducible (level B) --------------------------------------------------------------------------------


def test_a_thousand_backwards_have_the_same_bits() -> None:
    of = on_device([1, 63, 64, 65, 600, 1024], None, 4, 72, torch.bfloat16)
    grad = gradient_of(of)
    first: list[Tensor] | None = None
    for _ in range(1000):
        out, lse = op._launch_varlen_attention(*of, 1)
        found = [out, lse, *op._launch_varlen_attention_backward(grad, None, *of[:3], out, lse, *of[3:], 1)]
        if first is None:
            first = found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_replays_of_a_graph_have_the_bits_of_a_launch() -> None:
    of = on_device([64, 256, 100], None, 4, 72, torch.bfloat16)
    expected = varlen_attention(*of, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = varlen_attention(*of, backend="triton")
    out.zero_()
    graph.replay()
    assert_same_bits(out, expected)


# --- the public function -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton", "flash", "torch"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lengths", [[128, 65, 300], [0], []], ids=["ragged", "no tokens", "empty"])
def test_every_backend(backend: str, dtype: torch.dtype, lengths: list[int]) -> None:
    if backend != "auto" and (reason := backends.why_not(backend, torch.device("cuda"), dtype)):
        pytest.skip(f"{backend}: {reason}")
    of = on_device(lengths, None, 4, 72, dtype)
    leaves = [x.detach().requires_grad_() for x in of[:3]]
    out = varlen_attention(*leaves, *of[3:], backend=backend)
    attention.assert_output(out.detach(), of)
    grad = gradient_of(of)
    found = torch.autograd.grad(out, leaves, grad)
    attention.assert_gradients(found, of, grad)


def test_float64_goes_to_pytorch() -> None:
    of = on_device([5, 9], dtype=torch.float64)
    attention.assert_output(varlen_attention(*of), of)
    with pytest.raises(backends.BackendUnavailableError, match="float64"):
        varlen_attention(*of, backend="triton")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    of = on_device([64, 100], None, 4, 72, torch.bfloat16)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, *of[3:], backend="triton").float().square().sum()

    leaves = [x.detach().requires_grad_() for x in of[:3]]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
