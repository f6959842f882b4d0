"""The adamw kernels under Triton's interpreter: the update level A, a step's numbers too, the norm to a rounding.

Every tensor lies between red zones of poison. Copies are fp16 here: the interpreter does not round to bf16.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelflow_kernels.adamw import FusedAdamW, TensorTable, gradient_norm, op, reference, table
from support import ode, packs
from support.adamw import ALIGNED, F32, F64, ODD, SETTINGS, assert_is, expected, launch, lists, numbers_of
from support.kernels import assert_same_bits, differing_bits, plain

pytestmark = [
    pytest.mark.interpret,
    # numpy's, about infinities and NaN put in on purpose
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

SMALL = {"BLOCK": 16}
NAMES = ("parameters", "exp_avgs", "exp_avg_sqs", "averages", "copies")


@pytest.fixture(params=[False, True], ids=["", "apart"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of keeping products from being fused."""
    from pixelflow_kernels.adamw import kernels

    if request.param:
        monkeypatch.setattr(kernels, "arch_of", lambda device: 100)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK", 48)


# --- the update: level A -------------------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 47, 48, 49, 64, 96, 131]), min_size=1, max_size=5)


@pytest.mark.usefixtures("small_chunks")
@packs.draws(30)
@given(data=st.data())
def test_update(data: st.DataObject) -> None:
    """Any sizes, types and places in memory, any bits; with and without averages, copies and zeroed gradients."""
    seed, zeroed = data.draw(packs.seeds()), data.draw(st.booleans())
    made = lists(
        [(size,) for size in data.draw(sizes)],
        seed,
        gradient=data.draw(st.sampled_from([F32, torch.bfloat16])),
        averaged=data.draw(st.booleans()),
        copy=data.draw(st.sampled_from([None, torch.float16])),
        guards=data.draw(st.sampled_from([(ALIGNED,), (ODD,), (ALIGNED, ODD, ALIGNED)])),
        hostile=True,
    )
    before, numbers = made.values(), numbers_of(seed)
    launch(made, numbers, zeroed, SMALL)
    assert_is(made, expected(before, numbers, zeroed))


def test_kept_apart(apart: None) -> None:
    """The detour that products take on one architecture keeps every bit."""
    made = lists([(130,), (16,)], hostile=True)
    before, numbers = made.values(), numbers_of(3)
    launch(made, numbers, config=SMALL)
    assert_is(made, expected(before, numbers))


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_a_step_that_does_not_count(zeroed: bool) -> None:
    made = lists([(131,), (0,), (48,)], hostile=True, gradient=torch.bfloat16)
    before = made.values()
    launch(made, numbers_of(5, applied=False), zeroed, SMALL)
    zeros = {"gradients": [torch.zeros_like(g) for g in before["gradients"]]} if zeroed else {}
    assert_is(made, before | zeros)


def test_many_values() -> None:
    """At the shipped configuration: 0 differing bits."""
    shapes = [(100_003,), (16384,), (1,)]
    made = lists(shapes, hostile=True, copy=None)
    before, numbers = made.values(), numbers_of(11)
    launch(made, numbers)
    want = expected(before, numbers)
    differing = sum(
        int(differing_bits(x, y).sum()) for name in want for x, y in zip(made[name], want[name], strict=True)
    )
    assert differing == 0
    made.assert_inside()


# --- a step's numbers ----------------------------------------------------------------------------------------

NORMS = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-30, 0.7, 1.0, 3e38, math.inf, math.nan, 2.0**63, 2.0**62]),
    st.floats(0, 10, width=32),
)
unit = st.floats(0, 1, exclude_max=True)


@packs.draws(40)
@given(data=st.data())
def test_numbers(data: st.DataObject) -> None:
    """To the last bit, whatever the step, the rate, its type and the settings; and the counters."""
    from pixelflow_kernels.adamw import kernels

    beta1, beta2, weight_decay = data.draw(unit), data.draw(unit), data.draw(unit)
    max_norm = data.draw(st.sampled_from([0.7, 1.0, 1e3, math.inf]))
    ema_decay = data.draw(st.sampled_from([0.0, 0.5, 0.9999, 1.0]))
    settings = {"beta1": beta1, "beta2": beta2, "eps": 1e-8, "weight_decay": weight_decay, "max_norm": max_norm}
    settings["ema_decay"] = ema_decay
    taken = data.draw(st.one_of(st.integers(0, 100), st.integers(0, 2**39)))
    counters = torch.tensor([taken, *data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))])
    norm = torch.tensor(data.draw(NORMS), dtype=F32)
    lr = torch.tensor(data.draw(unit), dtype=data.draw(st.sampled_from([F32, F64])))
    want = reference.numbers(norm.item(), lr.item(), taken, **settings)
    counted, numbers = counters.clone(), torch.full((9,), -1.0)
    reference.count_(counted, bool(want[0]))
    kernels.launch_numbers(norm, lr, counters, numbers, settings)
    assert counters.tolist() == counted.tolist()
    if want[0]:  # else nobody reads the others
        assert_same_bits(numbers, torch.tensor(want, dtype=F64).float(), "numbers")
    assert numbers[0] == want[0]


@pytest.mark.parametrize("norm", [0.0, 1e-45, 0.7, 3e38, math.inf, math.nan, 2.0**63, 2.0**62])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_numbers_of_norms_at_the_edge(norm: float, max_norm: float) -> None:
    """What is not finite never counts; what is so large that its squares are not, only where it is clipped."""
    from pixelflow_kernels.adamw import kernels

    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "max_norm": max_norm, "ema_decay": 0.5}
    counters, numbers = torch.tensor([3, 1, 1]), torch.full((9,), -1.0)
    kernels.launch_numbers(torch.tensor(norm), torch.tensor(1e-3), counters, numbers, settings)
    counts = math.isfinite(norm) and (max_norm == 1.0 or norm < 2.0**63)
    assert counters.tolist() == ([4, 1, 0] if counts else [3, 2, 2])
    assert numbers[0] == float(counts)


# --- the norm ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@packs.draws(15)
@given(data=st.data())
def test_norm(data: st.DataObject) -> None:
    """Half a unit from the root of the exact sum; where a tensor lies makes no difference in any bit."""
    from pixelflow_kernels.adamw import kernels

    seed, dtype = data.draw(packs.seeds()), data.draw(st.sampled_from([F32, torch.bfloat16]))
    scale, drawn = data.draw(st.sampled_from([1.0, 1e-30, 1e30])), data.draw(sizes)
    found = []
    for guard in (ALIGNED, ODD):
        made = lists([(size,) for size in drawn], seed, gradient=dtype, averaged=False, copy=None, guards=(guard,))
        gradients = made["gradients"]
        for gradient in gradients:
            gradient.copy_(gradient.double() * scale)
        where = TensorTable.of({"gradients": gradients})
        norm = torch.full((), math.nan)
        configs = {"squares": SMALL, "norm": {"BLOCK": 4}}
        kernels.launch_norm(where.pointers, where.chunks, dtype, norm, configs)
        made.assert_inside()
        found.append(norm)
    true = math.sqrt(math.fsum(x * x for g in gradients for x in g.double().tolist()))
    assert found[0].item() == pytest.approx(true, rel=2.0**-24 + 1e-12, abs=0)
    assert_same_bits(*found)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 47, 48, 130])
@pytest.mark.usefixtures("small_chunks")
def test_a_value_that_is_not_finite_reaches_the_norm(bad: float, place: int) -> None:
    gradients = [torch.ones(5), torch.ones(131)]
    gradients[1][place] = bad
    norm = gradient_norm(gradients).item()
    assert norm == math.inf or (math.isnan(bad) and math.isnan(norm))


# --- whole steps ---------------------------------------------------------------------------------------------

SHAPES = [(7, 33), (144,), (1,), (0, 5), (3, 40, 5)]


def build() -> FusedAdamW:
    made = [[ode.normal(*shape, seed=i + k) for i, shape in enumerate(SHAPES)] for k in range(2)]
    return FusedAdamW(*made, [p.half() for p in made[0]], lr=1e-2, **SETTINGS)


def test_steps_have_the_bits_of_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped and not, skipped and not, gradients zeroed or kept, at the same place or at another in each step."""
    kernels_one, plain_one = build(), build()
    static = [torch.zeros(shape) for shape in SHAPES]
    for step in range(8):
        gradients = [ode.normal(*shape, seed=9 * step + i, std=0.01 + step % 3) for i, shape in enumerate(SHAPES)]
        if step == 4:
            gradients[1][3] = math.inf
        moving, zeroed = step in (3, 5), step % 2 == 0
        mine = gradients if moving else [s.copy_(g) for s, g in zip(static, gradients, strict=True)]
        others = [g.clone() for g in gradients]
        norm = kernels_one.update(mine, zero_gradients=zeroed)
        with monkeypatch.context() as patch:
            patch.setattr("pixelflow_kernels.adamw.op._adamw_ema", plain(op._adamw_ema))
            plain_one.update(others, norm, zero_gradients=zeroed)
        for name in NAMES:
            for x, y in zip(getattr(kernels_one, name), getattr(plain_one, name), strict=True):
                assert_same_bits(x, y, f"{name} after step {step}")
        for x, y in zip(mine, others, strict=True):
            assert_same_bits(x, y, f"gradients after step {step}")
        assert kernels_one.counters.tolist() == plain_one.counters.tolist()
    assert kernels_one.counters.tolist() == [7, 1, 0]


def test_a_step_is_four_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors there are, and whether the step counts."""
    from pixelflow_kernels.adamw import kernels

    launched: list[str] = []
    for name in ("squares", "norm", "numbers", "update"):
        monkeypatch.setattr(kernels, f"_{name}_kernel", Counted(name, getattr(kernels, f"_{name}_kernel"), launched))
    for count in (1, 7):
        optimizer = FusedAdamW([torch.ones(5) for _ in range(count)])
        for value in (1.0, math.nan):
            launched.clear()
            optimizer.update([torch.full((5,), value) for _ in range(count)], zero_gradients=True)
            assert launched == ["squares", "norm", "numbers", "update"]
    optimizer.update([torch.ones(5) for _ in range(count)], torch.tensor(1.0))
    assert launched[4:] == ["numbers", "update"]


class Counted:
    """A kernel that says when it is launched."""

    def __init__(self, name: str, kernel: Any, launched: list[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


def test_the_callers_default_dtype_changes_nothing() -> None:
    """Neither the norm's nor that of a step's numbers, which the kernels fill."""
    usual, other = build(), build()
    gradients = [ode.normal(*shape, seed=40 + i) for i, shape in enumerate(SHAPES)]
    norm = usual.update(gradients)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(other.update(gradients), norm, "norm")
    finally:
        torch.set_default_dtype(F32)
    for name in NAMES:
        for x, y in zip(getattr(other, name), getattr(usual, name), strict=True):
            assert_same_bits(x, y, name)


def test_copies_that_functionalization_makes_are_what_is_worked_on() -> None:
    """A call with other tensors than the table was made of changes those, and those alone."""
    optimizer = build()
    gradients = [ode.normal(*shape, seed=40 + i) for i, shape in enumerate(SHAPES)]
    optimizer.update(gradients)
    twin = copy.deepcopy(optimizer)
    stale = optimizer._table
    assert stale is not None
    kept = [p.clone() for p in optimizer.parameters]
    twin._table = stale  # as if its tensors had been copied
    op.apply_update(
        twin._lists(gradients), twin.counters, twin.lr, torch.tensor(1.0), twin.settings, False, stale
    )  # fmt: skip
    for p, k, q in zip(optimizer.parameters, kept, twin.parameters, strict=True):
        assert_same_bits(p, k)
        assert p.numel() == 0 or not torch.equal(q, p)


def test_no_values_at_all() -> None:
    optimizer = FusedAdamW([torch.ones(0), torch.ones(3, 0)])
    assert optimizer.update([torch.ones(0), torch.ones(3, 0)]).item() == 0.0
    assert optimizer.counters.tolist() == [1, 0, 0]
