"""adamw in plain PyTorch: beside torch's own and float64, what it skips, what it refuses; as custom operations.

The kernels are held to the same reference, bit for bit, in ``test_adamw_interpret.py``.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelflow_kernels.adamw import FusedAdamW, TensorTable, adamw_ema_, gradient_norm, op, reference, table
from pixelflow_training.ema import EMA
from support import ode
from support.adamw import F32, F64, ODD, SETTINGS, Truth, assert_near, expected, lists
from support.kernels import assert_same_bits, same_bits

SHAPES = [(7, 33), (144,), (1,), (0, 5), (3, 40, 5)]
LR = 1e-2


def draw(step: int, dtype: torch.dtype = F32) -> list[Tensor]:
    """Gradients whose size changes from step to step, so that some are clipped; some values are always 0."""
    scale = (0.003, 0.3, 0.02)[step % 3]
    gradients = [ode.normal(*shape, dtype=dtype, seed=100 * step + i, std=scale) for i, shape in enumerate(SHAPES)]
    gradients[0][:, 0] = 0
    return gradients


def parameters(seed: int = 0) -> list[Tensor]:
    return [ode.normal(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]


# --- beside float64, torch's AdamW and the trainer's average -------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_many_steps_stay_within_the_bound_of_their_roundings(dtype: torch.dtype, weight_decay: float) -> None:
    settings = SETTINGS | {"weight_decay": weight_decay}
    start = parameters()
    optimizer = FusedAdamW([p.clone() for p in start], [p.clone() for p in start], lr=LR, **settings)
    truth = Truth(start)
    for step in range(60):
        gradients = draw(step, dtype)
        lr = LR / (1 + step % 5)
        optimizer.lr.fill_(lr)
        optimizer.update(gradients)
        truth.step(gradients, lr, **settings)
    assert_near(optimizer.exp_avgs, truth.m, truth.em, "first moment")
    assert_near(optimizer.exp_avg_sqs, truth.v, truth.ev, "second moment")
    assert_near(optimizer.averages, truth.a, truth.ea, "average")
    # The bound is not idle: what it allows is far below what a step changes.
    assert assert_near(optimizer.parameters, truth.p, truth.ep, "parameter") > 0.01
    assert max(float(e.max()) for e in truth.ep if e.numel()) < LR / 100
    assert optimizer.counters.tolist() == [60, 0, 0]


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}], ids=str)
def test_beside_torch(kind: dict[str, bool]) -> None:
    """torch's AdamW, its clipping and the trainer's average: as far apart as their roundings allow, and no further."""
    start = parameters(5)
    ours = FusedAdamW([p.clone() for p in start], [p.clone() for p in start], lr=LR, **SETTINGS)
    model = nn.Module()
    for i, p in enumerate(start):
        model.register_parameter(f"p{i}", nn.Parameter(p.clone()))
    ema = EMA(model, SETTINGS["ema_decay"])
    names = ("betas", "eps", "weight_decay")
    theirs = torch.optim.AdamW(model.parameters(), lr=LR, **{name: SETTINGS[name] for name in names}, **kind)
    truth, torchs = Truth(start), Truth(start, plain=True)
    for step in range(40):
        gradients = draw(step)
        norm = ours.update([g.clone() for g in gradients])
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        their_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_norm"])
        assert norm.item() == pytest.approx(
            their_norm.item(), rel=300 * 2.0**-24
        )  # theirs: a float32 sum of 300 values
        theirs.step()
        ema.update(model)
        for bound in (truth, torchs):
            bound.step(gradients, LR, **SETTINGS)
    # Their clip factor carries the error of their norm, 300 units at most.
    bounds = [a + b for a, b in zip(truth.ep, torchs.ep, strict=True)]
    assert_near(ours.parameters, [p.detach().double() for p in model.parameters()], bounds, "parameter")
    bounds = [a + b for a, b in zip(truth.ea, torchs.ea, strict=True)]
    assert_near(ours.averages, [p.detach().double() for p in ema.model.parameters()], bounds, "average")


def test_the_average_warms_up_as_the_trainers_does() -> None:
    """Weights of the average at each step: those of ``EMA``, from a model that is 1 where the average is 0."""
    for limit in (0.0, 0.3, 0.9999, 1.0):
        model = nn.Linear(1, 1, bias=False, dtype=F64)
        ema = EMA(model, limit)
        for taken in range(30):
            with torch.no_grad():
                ema.model.weight.zero_()
                model.weight.fill_(1.0)
            ema.update(model)
            weight = reference.numbers(1.0, LR, taken, 0.9, 0.999, 1e-8, 0.0, 1.0, limit)[8]
            assert weight == pytest.approx(ema.model.weight.item(), abs=2.0**-52), (limit, taken)


@pytest.mark.parametrize("base", [0.9, 0.999, 0.0, 0.5])
def test_powers_by_squaring(base: float) -> None:
    """Relative error of ``base ** t``: a product's rounding for each of the t factors at most."""
    tiny = Fraction(1, 2**1022)  # below it, products lose bits
    for exponent in (0, 1, 2, 3, 7, 64, 1000, 4095):
        true = Fraction(base) ** exponent
        assert abs(Fraction(reference.power(base, exponent)) - true) <= true * exponent * Fraction(1, 2**52) + tiny
    assert reference.power(0.999, 10**9) == 0.0


# --- the norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_norm_is_that_of_exact_sums(dtype: torch.dtype, scale: float) -> None:
    """Squares of 1e-30 and 1e30 are no float32 numbers; half a unit of the result, and next to nothing before."""
    gradients = [(ode.normal(*shape, seed=i).double() * scale).to(dtype) for i, shape in enumerate(SHAPES)]
    true = math.sqrt(math.fsum(x * x for g in gradients for x in g.double().flatten().tolist()))
    assert gradient_norm(gradients).item() == pytest.approx(true, rel=2.0**-24 + 1e-12, abs=0)
    assert gradient_norm(gradients).dtype == F32


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([math.inf, 1.0], math.inf),
        ([-math.inf], math.inf),
        ([math.nan, 1.0], math.nan),
        ([math.inf, math.nan], math.nan),
        ([3e38, 3e38], math.inf),
        ([], 0.0),
        ([0.0, -0.0], 0.0),
    ],
)
def test_special_norms(values: list[float], norm: float) -> None:
    got = gradient_norm([torch.ones(0), torch.tensor(values)]).item()
    assert got == norm or (math.isnan(norm) and math.isnan(got))


# --- skipped steps, clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, zeroed: bool) -> None:
    """Bit for bit; it is counted; the next one goes on as if it had never been."""
    optimizer = FusedAdamW(parameters(), parameters(1), [p.bfloat16() for p in parameters()], **SETTINGS)
    twin = copy.deepcopy(optimizer)
    for step in range(2):
        optimizer.update(draw(step))
        twin.update(draw(step))
    for i in range(3):
        gradients = draw(7)
        gradients[1][i] = bad
        kept = [g.clone() for g in gradients]
        assert not optimizer.update(gradients, zero_gradients=zeroed).isfinite()
        assert optimizer.counters.tolist() == [2, i + 1, i + 1]
        for g, k in zip(gradients, kept, strict=True):
            assert_same_bits(g, torch.zeros_like(g) if zeroed else k, "gradient")
        assert_equal_state(optimizer, twin)
    optimizer.update(draw(8))
    twin.update(draw(8))
    assert optimizer.counters.tolist() == [3, 3, 0]
    assert_equal_state(optimizer, twin)


def assert_equal_state(one: FusedAdamW, other: FusedAdamW) -> None:
    for name in ("parameters", "averages", "copies", "exp_avgs", "exp_avg_sqs"):
        for x, y in zip(getattr(one, name), getattr(other, name), strict=True):
            assert_same_bits(x, y, name)


def test_a_norm_that_is_given_decides() -> None:
    """That of all ranks; or NaN, for a loss that is not finite."""
    one, other = FusedAdamW(parameters(), **SETTINGS), FusedAdamW(parameters(), **SETTINGS)
    gradients = draw(0)
    norm = one.update(gradients, torch.tensor(1e4))
    assert norm.item() == 1e4
    other.update([g * torch.tensor(0.7 / (1e4 + 1e-6), dtype=F64).float() for g in gradients], torch.tensor(0.0))
    assert_equal_state(one, other)
    one.update(gradients, torch.tensor(math.nan))
    assert_equal_state(one, other)
    assert one.counters.tolist() == [1, 1, 1]


def test_what_is_not_clipped_may_not_have_squares_that_overflow() -> None:
    """Or a second moment would be infinite, and NaN a step later. Clipped, such a gradient is a gradient."""
    gradients = [torch.full((3,), 1e19)]
    free = FusedAdamW([torch.ones(3)], max_norm=math.inf)
    free.update(gradients)
    assert free.counters.tolist() == [0, 1, 1]
    clipped = FusedAdamW([torch.ones(3)], max_norm=1.0)
    clipped.update(gradients)
    assert clipped.counters.tolist() == [1, 0, 0]
    for _ in range(3):
        free.update([torch.full((3,), 2.0**61)])
    assert free.counters.tolist() == [3, 1, 0]
    for optimizer in (free, clipped):
        assert all(bool(x.isfinite().all()) for x in (*optimizer.parameters, *optimizer.exp_avg_sqs))


def test_no_clipping() -> None:
    assert reference.numbers(123.0, LR, 0, 0.9, 0.999, 1e-8, 0.0, math.inf, 0.5)[:2] == [1.0, 1.0]
    assert reference.numbers(0.0, LR, 0, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.5)[:2] == [1.0, 1.0]


# --- the operation -------------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = F32, **kind: Any) -> tuple[Any, ...]:
    """Of the update's custom operation."""
    made = lists(SHAPES, gradient=dtype, **kind)
    found = TensorTable.of({name: made[name] for name in made.guarded})
    six = [made[name] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages", "copies")]
    numbers = (torch.tensor([4, 1, 1]), torch.tensor(LR, dtype=F64), torch.tensor(2.0))
    return (*six, *numbers, 0.9, 0.95, 1e-8, 0.05, 0.7, 0.6, True, found.pointers, found.known, found.chunks)


@pytest.mark.parametrize("kind", [{}, {"averaged": False, "copy": None}, {"dtype": torch.bfloat16}], ids=str)
def test_opcheck(kind: dict[str, Any]) -> None:
    given = arguments(**kind)
    torch.library.opcheck(op._adamw_ema, given)
    torch.library.opcheck(op._gradient_norm, (given[1], given[-3][:1], given[-2][:1], given[-1]))


def test_compiled_whole() -> None:
    """Mutation is declared, so what reads a parameter afterwards in the same graph reads the new one."""

    def step(*given: Any) -> Tensor:
        torch.ops.pixelflow.adamw_ema(*given)
        return given[0][0] + given[4][0]

    eager, traced = arguments(), arguments()
    want = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    assert_same_bits(got, want)
    for mine, other in zip(eager[:6], traced[:6], strict=True):
        for x, y in zip(mine, other, strict=True):
            assert_same_bits(x, y)


def test_the_function_and_the_object_do_the_same() -> None:
    """The second of two steps; the parts in which the plain form works make no difference."""
    optimizer = FusedAdamW(parameters(), parameters(1), [p.half() for p in parameters()], lr=LR, **SETTINGS)
    optimizer.update(draw(0))
    names = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages", "copies")
    gradients = draw(1)
    six = [[t.clone() for t in (gradients if n == "gradients" else getattr(optimizer, n))] for n in names]
    before = dict(zip(names, six, strict=True))
    counters, norm = optimizer.counters.clone(), gradient_norm(gradients)
    found = reference.numbers(norm.item(), LR, 1, *SETTINGS["betas"], *[SETTINGS[n] for n in [*SETTINGS][1:]])
    want = expected(before, torch.tensor(found, dtype=F64).float())
    adamw_ema_(*six, counters, optimizer.lr, norm, **SETTINGS)
    optimizer.update(gradients, norm)
    assert counters.tolist() == optimizer.counters.tolist() == [2, 0, 0]
    for name, tensors in zip(names, six, strict=True):
        others = gradients if name == "gradients" else getattr(optimizer, name)
        for x, y, z in zip(tensors, others, want[name], strict=True):
            assert_same_bits(x, y, name)
            assert_same_bits(x, z, name)


def test_parts_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FusedAdamW(parameters(), parameters(1), lr=LR, **SETTINGS)
    other = copy.deepcopy(one)
    one.update(draw(1))
    monkeypatch.setattr(op, "PART", 7)
    other.update(draw(1))
    assert_equal_state(one, other)


def test_going_on_from_a_copy_of_its_tensors() -> None:
    """All that a step depends on lies in them."""
    one = FusedAdamW(parameters(), parameters(1), [p.bfloat16() for p in parameters()], lr=LR, **SETTINGS)
    for step in range(4):
        one.update(draw(step))
    other = FusedAdamW(parameters(9), parameters(9), [p.bfloat16() for p in parameters(9)], lr=1.0, **SETTINGS)
    for name in ("parameters", "averages", "copies", "exp_avgs", "exp_avg_sqs"):
        for x, y in zip(getattr(one, name), getattr(other, name), strict=True):
            y.copy_(x)
    other.counters.copy_(one.counters)
    other.lr.copy_(one.lr)
    for step in range(4, 7):
        one.update(draw(step))
        other.update(draw(step))
    assert_equal_state(one, other)
    assert one.counters.tolist() == other.counters.tolist()


def test_moments_of_somebody_else() -> None:
    """They are gone on with in place; their gradients' norm can be had before, wherever gradients lie by then."""
    one = FusedAdamW(parameters(), lr=LR, **SETTINGS)
    one.update(draw(0))
    moments = [m.clone() for m in one.exp_avgs], [v.clone() for v in one.exp_avg_sqs]
    other = FusedAdamW([p.clone() for p in one.parameters], moments=moments, lr=LR, **SETTINGS)
    other.counters.copy_(one.counters)
    for step in (1, 2):
        gradients = draw(step)
        norm = other.norm(gradients)
        assert_same_bits(norm, gradient_norm(gradients))
        assert_same_bits(other.update([g.clone() for g in gradients], norm), one.update(gradients))
    assert_equal_state(one, other)
    for mine, given in zip((*other.exp_avgs, *other.exp_avg_sqs), (*moments[0], *moments[1]), strict=True):
        assert mine is given


def test_a_parameter_of_a_model() -> None:
    """It requires grad, it is changed in place, and autograd is told so."""
    layer = nn.Linear(4, 3)
    loss = layer(torch.ones(2, 4)).square().sum()
    held = layer(torch.ones(2, 4, requires_grad=True)).square().sum()
    loss.backward()
    optimizer = FusedAdamW([*layer.parameters()], copies=[p.detach().bfloat16() for p in layer.parameters()])
    before = [p.detach().clone() for p in layer.parameters()]
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    optimizer.update(gradients)
    for p, b, c in zip(layer.parameters(), before, optimizer.copies, strict=True):
        assert not same_bits(p.detach(), b)
        assert p.requires_grad
        assert p.is_leaf
        assert_same_bits(c, p.detach().bfloat16())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_the_callers_default_device_changes_nothing() -> None:
    usual = FusedAdamW(parameters(), parameters(1), [p.half() for p in parameters()], lr=LR, **SETTINGS)
    other, gradients = copy.deepcopy(usual), draw(0)
    norm = usual.update(gradients)
    with torch.device("meta"):
        assert_same_bits(other.update(gradients), norm)
    assert_equal_state(other, usual)
    assert other.counters.tolist() == usual.counters.tolist() == [1, 0, 0]


# --- the table -----------------------------------------------------------------------------------------------


def test_chunks_cover_every_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK", 16)
    sizes = [0, 1, 15, 16, 17, 0, 32, 33]
    found = TensorTable.of({"x": [torch.zeros(size) for size in sizes]})
    seen = [torch.zeros(size) for size in sizes]
    for number, start, count in found.chunks.T.tolist():
        assert 0 < count <= 16
        assert start % 16 == 0
        seen[number][start : start + count] += 1
    assert all(bool((x == 1).all()) for x in seen)
    assert found.chunks.is_contiguous()


def test_a_table_follows_tensors_that_move() -> None:
    x, y = [torch.zeros(3), torch.zeros(0), torch.zeros(5)], [torch.ones(3), torch.ones(0), torch.ones(5)]
    found = TensorTable.of({"x": x, "y": y})
    assert found.pointers.tolist() == [[t.data_ptr() for t in tensors] for tensors in (x, y)]
    assert found.following([x, y]) is found
    y[2] = torch.ones(5)
    moved = found.following([x, y])
    assert moved.pointers.tolist() == [[t.data_ptr() for t in tensors] for tensors in (x, y)]
    assert moved.chunks is found.chunks


def test_a_table_that_a_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step outside of the graph, with gradients elsewhere, must not free the addresses that replays read."""
    optimizer, static = FusedAdamW([torch.ones(5)]), [torch.ones(5)]
    optimizer.update(static)
    pointers: list[weakref.ref[Tensor]] = []
    for recording in (True, False):
        monkeypatch.setattr("pixelflow_kernels.adamw.optimizer.capturing", lambda _, now=recording: now)
        optimizer.update(static if recording else [torch.ones(5)])
        assert optimizer._table is not None
        pointers.append(weakref.ref(optimizer._table.pointers))
    optimizer.update([torch.ones(5)])
    assert [kept() is not None for kept in pointers] == [True, False]


# --- what is refused -----------------------------------------------------------------------------------------

ONE = [torch.ones(4, 6), torch.ones(5)]


def changed(i: int, tensor: Any) -> list[Any]:
    return [tensor if k == i else x.clone() for k, x in enumerate(ONE)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FusedAdamW([]), r"parameters: got no tensors, expected at least one"),
        (lambda: FusedAdamW(changed(1, torch.ones(5, dtype=F64))), r"parameters\[1\]: got torch.float64, expected the"),
        (lambda: FusedAdamW([torch.ones(5, dtype=F64)]), r"parameters: got torch.float64, expected torch.float32"),
        (lambda: FusedAdamW(changed(0, torch.ones(6, 4).T)), r"parameters\[0\]: got strides \(1, 4\), expected a"),
        (lambda: FusedAdamW(changed(1, torch.ones(5, device="meta"))), r"parameters\[1\]: got device meta, expected"),
        (lambda: FusedAdamW(ONE, changed(1, torch.ones(6))), r"averages\[1\]: got shape \(6,\), expected \(5,\)"),
        (lambda: FusedAdamW(ONE, moments=(ONE, ONE)), r"got memory that is also that of"),
        (lambda: FusedAdamW(ONE, moments=(ONE[:1], ONE)), r"exp_avgs: got 1 tensors, expected 2, as many as p"),
        (lambda: FusedAdamW(ONE, ONE[:1]), r"averages: got 1 tensors, expected 2, as many as parameters"),
        (lambda: FusedAdamW(ONE, ONE), r"\[\d\]: got memory that is also that of \w+\[\d\]"),
        (lambda: FusedAdamW([ONE[0], ONE[0][1]]), r"parameters\[1\]: got memory that is also that of parameters\[0\]"),
        (lambda: FusedAdamW(ONE, copies=changed(0, ONE[0].clone())), r"copies: got torch.float32, expected torch.bfl"),
        (lambda: FusedAdamW(ONE, averages=[x.half() for x in ONE]), r"averages: got torch.float16, expected torch.fl"),
        (lambda: FusedAdamW(changed(0, Odd(ONE[0]))), r"parameters\[0\]: got Odd, expected a plain tensor"),
        (lambda: FusedAdamW(ONE, lr=math.nan), "lr: got nan, expected a finite number of 0 or more"),
        (lambda: FusedAdamW(ONE, lr=-1.0), "lr: got -1.0, expected"),
        (lambda: FusedAdamW(ONE, lr=math.inf), "lr: got inf, expected"),
        (lambda: FusedAdamW(ONE, betas=(0.9, 1.0)), r"betas: got \(0.9, 1.0\), expected two numbers from 0 to below 1"),
        (lambda: FusedAdamW(ONE, betas=(0.9, math.nan)), "betas: got"),
        (lambda: FusedAdamW(ONE, eps=0.0), r"eps: got 0.0, expected a number of 2\^-126 or more"),
        (lambda: FusedAdamW(ONE, weight_decay=-1.0), "weight_decay: got -1.0, expected a number of 0 or more"),
        (lambda: FusedAdamW(ONE, max_norm=0.0), "max_norm: got 0.0, expected a number above 0"),
        (lambda: FusedAdamW(ONE, ema_decay=1.1), "ema_decay: got 1.1, expected a number from 0 to 1"),
        (lambda: FusedAdamW(ONE).update(ONE[:1]), "gradients: got 1 tensors, expected 2, as many as parameters"),
        (lambda: FusedAdamW(ONE).update([x.half() for x in ONE]), "gradients: got torch.float16, expected torch"),
        (lambda: FusedAdamW(ONE).update(ONE), "got memory that is also that of"),
        (lambda: FusedAdamW(ONE).update(changed(0, 0.5), None), r"gradients\[0\]: got float, expected a plain tensor"),
        (lambda: FusedAdamW(ONE).update(changed(0, ONE[0].clone()), torch.ones(1)), r"norm: got shape \(1,\)"),
        (lambda: FusedAdamW(ONE).update(changed(0, ONE[0].clone()), torch.ones((), dtype=F64)), "norm: got torch"),
        (lambda: gradient_norm([]), "gradients: got no tensors"),
        (lambda: gradient_norm([torch.ones(3, dtype=F64)]), "gradients: got torch.float64, expected torch"),
        (lambda: call(counters=torch.zeros(3)), "counters: got torch.float32, expected torch.int64"),
        (lambda: call(lr=torch.zeros(1)), r"lr: got shape \(1,\), expected \(\)"),
        (lambda: call(lr=torch.zeros((), device="meta")), r"lr: got device meta, expected that of the parameters"),
        (lambda: call(counters=torch.zeros(6, dtype=torch.int64)[::2]), r"counters: got strides \(2,\), expected"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gradients_that_move_onto_other_memory_are_refused() -> None:
    """In any update, and again in the next one."""
    optimizer = FusedAdamW([x.clone() for x in ONE])
    optimizer.update([x.clone() for x in ONE])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\w+\[1\]: got memory that is also that of \w+\[1\]"):
            optimizer.update(changed(1, optimizer.exp_avgs[1]))
    assert optimizer.counters.tolist() == [1, 0, 0]


class Odd(Tensor):
    """A subclass whose memory may be somewhere else."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Odd:
        return Tensor._make_subclass(cls, x)


def call(**other: Tensor) -> None:
    given = {"counters": torch.zeros(3, dtype=torch.int64), "lr": torch.tensor(LR), "norm": torch.tensor(1.0)} | other
    six = [[x.clone() for x in ONE] for _ in range(5)]
    adamw_ema_(*six, [x.half() for x in ONE], **given)


def test_memory_beside_another_is_no_memory_shared() -> None:
    """Views into one bucket, as of gradients, at any places in it."""
    bucket = torch.zeros(29)
    gradients = [bucket[:24].view(4, 6), bucket[24:]]
    optimizer = FusedAdamW([x.clone() for x in ONE])
    optimizer.update(gradients)
    assert gradients[1].data_ptr() % 16 == 0
    odd = torch.zeros(ODD)
    optimizer.update([odd[1:25].view(4, 6), odd[25:30]])
    assert optimizer.counters.tolist() == [2, 0, 0]
