"""The compiled adamw kernels, emulated: the update level A, a step's numbers too, the norm to a rounding.

Every tensor lies between red zones of poison.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pixelflow_kernels.adamw import FusedAdamW, gradient_norm, kernels, op, reference, table
from support import ode
from support.adamw import ALIGNED, F32, F64, ODD, SETTINGS, assert_is, expected, launch, lists, numbers_of
from support.compiled import by_arch, compiled_for, compiles
from support.kernels import assert_same_bits, plain

pytestmark = [
    compiles,
    by_arch,
    # numpy's, about infinities and NaN put in on purpose
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

HALF = torch.bfloat16
SHAPES = [(7, 33), (2048,), (1,), (0, 5), (3001,)]
NAMES = ("parameters", "exp_avgs", "exp_avg_sqs", "averages", "copies")


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks each."""
    monkeypatch.setattr(table, "CHUNK", 2048)


# --- the update: level A -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "copied", "averaged", "zeroed"),
    [
        (HALF, HALF, True, True),
        (HALF, torch.float16, False, False),
        (F32, HALF, True, False),
        (F32, None, True, True),
        (F32, None, False, False),
    ],
)
def test_update_has_the_bits_of_eager_pytorch(
    arch: int, gradient: torch.dtype, copied: torch.dtype | None, averaged: bool, zeroed: bool
) -> None:
    """Any bits; tensors at aligned places, at others, and of each kind in one update."""
    for guards in ((ALIGNED,), (ODD,), (ALIGNED, ODD, ALIGNED)):
        made = lists(SHAPES, 3, gradient=gradient, averaged=averaged, copy=copied, guards=guards, hostile=True)
        before, numbers = made.values(), numbers_of(4)
        with compiled_for(arch) as gpu:
            launch(made, numbers, zeroed)
        assert gpu.launched == {"_update_kernel": 1}
        assert_is(made, expected(before, numbers, zeroed))


def test_small_blocks(arch: int) -> None:
    made = lists([(131,), (16,)], 5, gradient=HALF, copy=HALF, guards=(ALIGNED, ODD, ALIGNED), hostile=True)
    before, numbers = made.values(), numbers_of(6)
    with compiled_for(arch):
        launch(made, numbers, config={"BLOCK": 16, "num_warps": 1})
    assert_is(made, expected(before, numbers))


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_step_that_does_not_count(arch: int, zeroed: bool) -> None:
    made = lists(SHAPES, hostile=True, gradient=HALF, copy=HALF)
    before = made.values()
    with compiled_for(arch):
        launch(made, numbers_of(5, applied=False), zeroed)
    zeros = {"gradients": [torch.zeros_like(g) for g in before["gradients"]]} if zeroed else {}
    assert_is(made, before | zeros)


# --- a step's numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [F32, F64])
def test_numbers(arch: int, rate: torch.dtype) -> None:
    """To the last bit, of steps at the beginning and at the end; norms that are clipped, or that do not count."""
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 0.7, "ema_decay": 0.9999}
    cases = [(n, taken) for n in (0.0, 1e-45, 0.7, 3e38) for taken in (0, 7, 2**39)]
    cases += [(n, 3) for n in (math.inf, math.nan, 2.0**62)]
    with compiled_for(arch) as gpu:
        for i, (size, taken) in enumerate(cases):
            settings["max_norm"] = math.inf if size == 2.0**62 else 0.7
            norm, lr = torch.tensor(size), torch.tensor(1e-3 / (1 + i), dtype=rate)
            want = reference.numbers(norm.item(), lr.item(), taken, **settings)
            counters, numbers = torch.tensor([taken, 1, i]), torch.full((9,), -1.0)
            counted = counters.clone()
            reference.count_(counted, bool(want[0]))
            kernels.launch_numbers(norm, lr, counters, numbers, settings)
            assert counters.tolist() == counted.tolist()
            assert numbers[0] == want[0] == math.isfinite(size)
            if want[0]:  # else nobody reads the others
                assert_same_bits(numbers, torch.tensor(want, dtype=F64).float(), f"numbers of {size} after {taken}")
    assert gpu.launched == {"_numbers_kernel": len(cases)}


# --- the norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, HALF])
def test_norm(arch: int, dtype: torch.dtype) -> None:
    """Half a unit from the root of the exact sum; where a tensor lies makes no difference in any bit."""
    found = []
    with compiled_for(arch) as gpu:
        for guard in (ALIGNED, ODD):
            made = lists(SHAPES, 7, gradient=dtype, averaged=False, copy=None, guards=(guard,))
            found.append(gradient_norm(made["gradients"]))
            made.assert_inside()
    assert gpu.launched == {"_squares_kernel": 2, "_norm_kernel": 2}
    true = math.sqrt(math.fsum(x * x for g in made["gradients"] for x in g.flatten().double().tolist()))
    assert found[0].item() == pytest.approx(true, rel=2.0**-24 + 1e-12, abs=0)
    assert_same_bits(*found)


def test_values_that_are_not_finite_or_large_reach_the_norm(arch: int) -> None:
    """More partial sums than the norm's kernel adds at a time."""
    gradients = [torch.ones(5), torch.ones(9), *(torch.ones(1) for _ in range(2048))]
    found = []
    with compiled_for(arch):
        for value in (math.inf, -math.inf, math.nan, 3e38, 1.0):
            gradients[-1][0] = value
            found.append(gradient_norm(gradients).item())
    assert found[:2] == [math.inf, math.inf]
    assert math.isnan(found[2])
    assert found[3:] == [torch.tensor(3e38).item(), torch.tensor(2062.0).sqrt().item()]


# --- whole steps -------------------------------------------------------------------------------------------


def build() -> FusedAdamW:
    made = [[ode.normal(*shape, seed=i + k) for i, shape in enumerate(SHAPES)] for k in range(2)]
    return FusedAdamW(*made, [p.bfloat16() for p in made[0]], lr=1e-2, **SETTINGS)


def draw(step: int, dtype: torch.dtype) -> list[Tensor]:
    gradients = [ode.normal(*shape, seed=9 * step + i, std=0.01 + step % 3) for i, shape in enumerate(SHAPES)]
    if step == 2:
        gradients[1][3] = math.inf
    return [g.to(dtype) for g in gradients]


@pytest.mark.parametrize("dtype", [F32, HALF])
def test_steps_have_the_bits_of_the_plain_form(arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same norm; a learning rate that changes; a step that is skipped; gradients zeroed."""
    compiled, in_torch = build(), build()
    with compiled_for(arch) as gpu:
        for step in range(4):
            mine, others = draw(step, dtype), draw(step, dtype)
            for optimizer in (compiled, in_torch):
                optimizer.lr.fill_(1e-2 / (1 + step))
            norm = compiled.update(mine, zero_gradients=True)
            with monkeypatch.context() as patch:
                patch.setattr("pixelflow_kernels.adamw.op._adamw_ema", plain(op._adamw_ema))
                in_torch.update(others, norm, zero_gradients=True)
            for name in NAMES:
                for x, y in zip(getattr(compiled, name), getattr(in_torch, name), strict=True):
                    assert_same_bits(x, y, f"{name} after step {step}")
            assert not any(bool(g.any()) for g in mine)
    assert compiled.counters.tolist() == in_torch.counters.tolist() == [3, 1, 0]
    assert gpu.launched == {f"_{name}_kernel": 4 for name in ("squares", "norm", "numbers", "update")}
