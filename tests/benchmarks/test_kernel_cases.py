"""The checks of the benchmark's cases: what they let pass, what they notice, and how much memory they take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pixelflow_benchmarks.suites.kernels import adamw, attention_truth, cascade, modulate, rope2d
from pixelflow_benchmarks.suites.kernels import case as case_module
from pixelflow_benchmarks.suites.kernels import varlen_attention as attention_cases
from pixelflow_benchmarks.suites.kernels.case import Case, Outputs, Problem, faults, level_d
from pixelflow_benchmarks.suites.kernels.cases import OPS, all_cases

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 2, 72
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def narrow(
    monkeypatch: pytest.MonkeyPatch, sides: tuple[int, ...], heads: int = HEADS, head_dim: int = HEAD_DIM
) -> None:
    """A model of few heads and stages with small images."""
    for module in (case_module, cascade, adamw):
        monkeypatch.setattr(module, "STAGE_SIDES", sides)
    for module in (rope2d, attention_cases):
        monkeypatch.setattr(module, "HEADS", heads)
        monkeypatch.setattr(module, "HEAD_DIM", head_dim)
    for module in (rope2d, modulate, attention_cases, adamw):
        monkeypatch.setattr(module, "WIDTH", heads * head_dim)


def two_swapped(x: Tensor, dim: int, size: int) -> Tensor:
    """The first two runs of ``size`` along a dimension, each in the other's place."""
    first, second, rest = x.split([size, size, x.shape[dim] - 2 * size], dim)
    return torch.cat([second, first, rest], dim)


def one_row_off(x: Tensor) -> Tensor:
    """One of the rows along the last dimension 5 % too large."""
    rows = x.reshape(-1, x.shape[-1]).clone()
    rows[len(rows) // 2] *= 1.05
    return rows.view(x.shape)


def corruptions(x: Tensor, images: int) -> Iterator[tuple[str, Tensor]]:
    """An output with typical faults of a kernel; ``images`` have equally many rows each."""
    yield "zeros", torch.zeros_like(x)
    last = x.clone()
    last[-max(len(x) // 16, 1) :] = 0
    yield "last tile", last
    yield "one row", one_row_off(x)
    if x.shape[-1] == HEADS * HEAD_DIM:
        yield "heads", two_swapped(x, -1, HEAD_DIM)
    elif x.shape[-2:] == (HEADS, HEAD_DIM):
        yield "heads", two_swapped(x, -2, 1)
    if x.ndim > 1:
        yield "images", two_swapped(x, 0, len(x) // images)


def passes(case: Case, ours: Outputs, plain: Outputs, truth: Outputs | None) -> list[str]:
    """What ``faults`` says of these outputs."""
    known = replace(case, plain=lambda: plain, truth=None if truth is None else lambda: truth)
    return faults(replace(known, variants={"ours": lambda: ours}))["ours"]


@pytest.mark.parametrize("made", [0, 1])
def test_inputs_that_cannot_be_made_end_no_other_case(made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds no tensor: what was allocated before it is free for the cases that follow."""
    narrow(monkeypatch, (4, 8, 16))
    honest, kept = rope2d.cases, []

    def lacking(problem: Problem) -> Iterator[Case]:
        yield from islice(honest(problem), made)
        x = problem.normal(4)
        kept.append(weakref.ref(x))
        raise torch.OutOfMemoryError("out of paper")

    monkeypatch.setattr(rope2d, "cases", lacking)
    found = [*all_cases(["rope2d", "modulate"], [0, 1], 2, torch.float32, CPU)]
    failed = [case for case in found if "." not in case.name]
    assert [case.name for case in failed] == ["rope2d/stage1-b2", "rope2d/stage0-b2"]
    assert len([case for case in found if case.name.startswith("rope2d.")]) == 2 * made
    assert len([case for case in found if case.name.startswith("modulate.")]) == 12
    assert faults(failed[0]) == {"ours": ["nothing to compare with: OutOfMemoryError: out of paper"]}
    assert [x() for x in kept] == [None, None]


@pytest.mark.parametrize(("op", "dtype"), [*product(OPS, DTYPES)], ids=str)
def test_what_a_case_does_not_let_pass(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of the command, with two images, which guidance doubles; stage 1 is the last one of cascade's."""
    narrow(monkeypatch, (2, 4) if op in ("cascade", "adamw") else (4, 8, 16))
    cases = [*all_cases([op], [1], 2, dtype, CPU)]
    assert cases
    for case in cases:
        plain, truth = case.plain(), None if case.truth is None else case.truth()
        if "ours" in case.variants:
            ours = case.variants["ours"]()
        else:  # attention has no implementation of its own on a CPU
            assert truth is not None
            ours = tuple(a.to(b.dtype) for a, b in zip(truth, plain, strict=True))
        assert passes(case, ours, plain, truth) == [], case.name
        for i, out in enumerate(ours):
            for what, wrong in corruptions(out, 2 if op in ("ode_step", "cascade") else 4):
                said = passes(case, (*ours[:i], wrong, *ours[i + 1 :]), plain, truth)
                assert len(said) == 1, (case.name, i, what)
                assert said[0].startswith(f"output {i}: "), (case.name, i, what, said)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_of_keys_that_is_skipped_is_noticed_in_long_images(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 of 2304 keys, in one of four images. What a sum is made of is far larger there than what it comes to."""
    narrow(monkeypatch, (48,), heads=1, head_dim=16)
    problem = Problem(0, 2, dtype, CPU)
    product = problem.normal(4 * 2304, 3 * 16)
    q, k, v = (part.unflatten(-1, (1, 16)) for part in product.chunk(3, dim=-1))
    grad = problem.normal(*q.shape, seed=1)

    def attend(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x)

    def skipping(*x: Tensor) -> Tensor:
        if torch.equal(x[0][0, :, 0].detach(), q[-2304]):
            x = (x[0], x[1][:, :, :-64], x[2][:, :, :-64])
        return F.scaled_dot_product_attention(*x)

    forward, backward = attention_cases.cases(problem)
    known = [(case, case.plain(), case.truth and case.truth()) for case in (forward, backward)]
    for function, right in ((attend, True), (skipping, False)):
        out = attention_truth.outputs(function, q, k, v, 2304)
        found = attention_truth.gradients(function, q, k, v, grad, 2304, dtype)
        for (case, plain, truth), ours in zip(known, ((out,), found), strict=True):
            said = passes(case, ours, plain, truth)
            assert len(said) == (0 if right else len(ours)), (case.name, said)


def no_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose backward pass a library refuses."""
    out = F.scaled_dot_product_attention(q, k, v)
    if out.requires_grad:
        out.register_hook(lambda grad: refuse())
    return out


def refuse() -> Tensor:
    raise RuntimeError("head size 72 has no backward pass\nand more")


def test_who_has_no_backward_pass_is_absent_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, (4,))

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object, backend: str, **more: object) -> Tensor:
        attention = no_backward if backend == "flash" else F.scaled_dot_product_attention
        parts = (x.unflatten(0, (4, 16)).transpose(1, 2) for x in (q, k, v))
        return attention(*parts).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr(attention_cases, "varlen_attention", attend)
    forward, backward = attention_cases.cases(Problem(0, 2, torch.float32, CPU))
    assert "FlashAttention" in forward.variants
    assert "FlashAttention" not in forward.absent
    assert backward.absent["FlashAttention"] == "RuntimeError: head size 72 has no backward pass"
    assert backward.variants.keys() == forward.variants.keys() - {"FlashAttention"}
    for case in (forward, backward):
        assert not any(faults(case).values())


def test_on_a_gpu_our_attention_is_not_excused() -> None:
    """It is a variant all the same, so that what it raises is its fault."""
    present, absent = attention_cases._present({"ours": refuse, "FlashAttention": refuse}, on_gpu=True)  # type: ignore[dict-item]
    assert (present.keys(), absent.keys()) == ({"ours"}, {"FlashAttention"})


def test_an_optimizer_that_cannot_be_made_is_at_fault_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, (2, 4))
    monkeypatch.setattr(adamw, "FusedAdamW", lambda *_, **more: refuse())
    (case,) = adamw.cases(Problem(1, 2, torch.float32, CPU))
    assert faults(case) == {
        "ours": ["RuntimeError: head size 72 has no backward pass"], "eager": [], "torch fused": [],
    }  # fmt: skip


def test_attention_is_looked_at_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further image takes the memory of its operands and results, not of its scores."""
    narrow(monkeypatch, (16,), heads=2, head_dim=8)
    scores, operand = 8 * 2 * 256**2, 8 * 2 * 256 * 8
    peaks = {batch: [peak(partial(faults, case)) for case in checked(batch)] for batch in (1, 4)}
    for one, four in zip(peaks[1], peaks[4], strict=True):
        assert one > scores
        assert four - one < 6 * 12 * operand < 6 * scores
        assert four > one


def checked(batch: int) -> list[Case]:
    """The cases of attention, with what the check itself computes and no more."""
    cases = attention_cases.cases(Problem(0, batch, torch.bfloat16, CPU))
    return [replace(case, variants={"ours": case.plain}) for case in cases]


def peak(function: Callable[[], object]) -> int:
    """Bytes that tensors made in a call took at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def test_a_row_is_measured_by_itself() -> None:
    """A small row is not hidden by a large one, nor by how far off plain PyTorch is in that one."""
    truth = torch.tensor([[1000.0, 1.0], [0.001, 0.0005]], dtype=torch.float64)
    plain = truth.float() * (1 + 1e-6)
    assert level_d(plain, plain, truth) is None
    wrong = plain.clone()
    wrong[1, 1] += 1e-5
    assert str(level_d(wrong, plain, truth)).startswith("error 1.0")


def test_rows_of_nothing_have_to_be_nothing() -> None:
    truth = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    plain = truth.float()
    assert level_d(plain, plain, truth) is None
    wrong = plain.clone()
    wrong[0, 0] = 1e-30
    assert str(level_d(wrong, plain, truth)).startswith("error ")


def test_a_bound_that_proves_nothing_is_a_fault() -> None:
    """As that of an attention whose scale was that of its logits and values: an output of zeros was below it."""
    truth = torch.ones(3, 4, dtype=torch.float64)
    off = truth.float() * 1.06
    assert str(level_d(truth.float(), off, truth)).startswith("a bound of 1.2e-01")
    assert str(level_d(truth.bfloat16(), truth.bfloat16(), truth, growth=20)).startswith("a bound of 1.6e-01")
    assert level_d(truth.bfloat16(), truth.bfloat16(), truth, growth=10) is None
    nan = truth.float()
    nan[1, 1] = torch.nan
    assert "nan" in str(level_d(truth.float(), nan, truth))
    assert "nan" in str(level_d(nan, truth.float(), truth))
