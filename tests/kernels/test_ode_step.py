"""ode_step on a CPU: the meaning against float64 and the engine's solver, the registration, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pixelflow_engine import guidance as engine_guidance
from pixelflow_engine import solvers
from pixelflow_engine.layers import patchify
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import (
    ARRIVED,
    MAX_ATTEMPTS,
    NONFINITE,
    RUNNING,
    UNDERFLOW,
    Adaptive,
    attempt_,
    begin_attempt_,
    control,
    control_kernels,
    end_attempt_,
    error_norm_,
    euler_step,
    euler_step_,
    first_slope_,
    norms,
    op,
    slope_change,
    stage_state_,
    start_,
    take_accepted_,
)
from support import ode, packs
from support.kernels import assert_same_bits, same_bits

F64 = torch.float64
SHAPE = (3, 2, 6, 4)  # of a state in image layout


# --- meaning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, [2.4], [1.0, 2.4, -0.3]])
@pytest.mark.parametrize("step", [[0.125], [0.1, 0.25, 0.003]])
def test_euler_in_float64_agrees_with_a_second_derivation(weight: list[float] | None, step: list[float]) -> None:
    x, v = ode.normal(*SHAPE, dtype=F64), ode.normal(6, *SHAPE[1:], dtype=F64, seed=1)
    v = v if weight else v[:3]
    w = None if weight is None else torch.tensor(weight, dtype=F64)
    out = euler_step(x, v, torch.tensor(step, dtype=F64), w)
    expected = ode.moved64(x, ode.guided64(v, weight, 3)[None], step, [1.0])
    torch.testing.assert_close(out.view(3, -1), torch.from_numpy(expected), rtol=0, atol=1e-14)
    euler_step_(x, v, torch.tensor(step, dtype=F64), w)
    assert same_bits(x, out)


@pytest.mark.parametrize("velocity", [torch.bfloat16, torch.float16, torch.float32])
def test_euler_has_the_bits_of_the_engines_update(velocity: torch.dtype) -> None:
    x, both = ode.hostile(*SHAPE), ode.hostile(6, *SHAPE[1:], dtype=velocity, seed=1)
    ends = torch.tensor([0.3, 0.4], dtype=F64).float()
    combined = engine_guidance.combine(both.to(torch.float32), 2.4)
    expected = solvers.euler_update(x, combined, 0.3, 0.4)
    assert_same_bits(euler_step(x, both, (ends[1] - ends[0])[None], 2.4), expected)
    expected = solvers.euler_update(x, both[:3].float(), 0.3, 0.4)
    assert_same_bits(euler_step(x, both[:3], ends.diff()), expected)


def test_a_number_is_rounded_as_eager_pytorch_rounds_it() -> None:
    x, v = ode.normal(*SHAPE), ode.normal(*SHAPE, seed=1)
    assert_same_bits(euler_step(x, v, 0.1), x + 0.1 * v)
    assert_same_bits(euler_step(x.double(), v, 0.1), x.double() + 0.1 * v.double())


def test_token_layout_gives_the_bits_of_image_layout() -> None:
    """An update does not care about the order of values; a slice of the head's wider output will do."""
    x, both = ode.normal(*SHAPE), ode.normal(6, *SHAPE[1:], dtype=torch.bfloat16, seed=1)
    step, w = ode.numbers(3), torch.tensor([1.0, 2.4, 3.0], dtype=F64)
    tokens = patchify(euler_step(x, both, step, w), 2)
    velocity = patchify(both, 2)
    assert_same_bits(euler_step(patchify(x, 2), velocity, step, w), tokens)
    assert_same_bits(euler_step(patchify(x, 2), ode.sliced(velocity, 8), step, w), tokens)
    # A pack of images of different sizes: each token an image, with its image's numbers.
    image = torch.arange(3).repeat_interleave(6)
    assert_same_bits(euler_step(patchify(x, 2), velocity, step[image], w[image]), tokens)


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_stages(count: int, fresh: bool, dtype: torch.dtype) -> None:
    x, slopes = ode.normal(*SHAPE, dtype=dtype), ode.normal(7, *SHAPE, dtype=dtype, seed=1)
    both = ode.normal(6, *SHAPE[1:], dtype=torch.bfloat16, seed=2)
    h, w, out, before = ode.numbers(3), 2.4, torch.full_like(x, torch.nan), slopes.clone()
    stage_state_(out, slopes, x, h, DOPRI5.coupling[count], both if fresh else None, w if fresh else None)
    if fresh:
        before[count - 1] = engine_guidance.combine(both.to(dtype), w)
    assert_same_bits(slopes, before, "slopes")
    total = solvers._weighted_sum(list(before[:count]), DOPRI5.coupling[count], h)
    assert_same_bits(out, x + total)
    truth = ode.moved64(x, before.double().numpy().reshape(7, 3, -1), h.tolist(), DOPRI5.coupling[count])
    error = (out.view(3, -1).double() - torch.from_numpy(truth)).abs().max().item()
    assert error <= 100 * torch.finfo(dtype).eps * abs(truth).max(), error


@pytest.mark.parametrize("batch_wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), SHAPE])
def test_norms(batch_wide: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    images, w = shape[0], [2.4]
    x, slopes = ode.normal(*shape, dtype=dtype), ode.normal(7, *shape, dtype=dtype, seed=1)
    both = ode.normal(2 * images, *shape[1:], dtype=dtype, seed=2)
    h, rtol, atol = ode.numbers(images), *ode.TOLERANCE
    weight = torch.tensor(w, dtype=F64)
    error = error_norm_(
        slopes, x, h, DOPRI5.coupling[6], DOPRI5.error, ode.tolerance(), both, weight, batch_wide=batch_wide
    )
    assert_same_bits(slopes[6], engine_guidance.combine(both, 2.4))
    high = slopes.double().clone().numpy().reshape(7, images, -1)
    norms = first_slope_(slopes[0], x, both, ode.tolerance(), images, weight, batch_wide=batch_wide)
    assert_same_bits(slopes[0], slopes[6])
    change = slope_change(slopes[1], x, both, ode.tolerance(), images, weight, batch_wide=batch_wide)
    rows, v = x.double().numpy().reshape(images, -1), ode.guided64(both, w, images)
    scale = atol + rtol * abs(rows)
    truths = [
        ode.error64(x, high, h.tolist(), batch_wide),
        *(ode.rms64(y, scale, batch_wide) for y in (rows, v, v - high[1])),
    ]
    for out, truth in zip((error, *norms, change), truths, strict=True):
        assert out.shape == (images,)
        torch.testing.assert_close(out, truth, rtol=4e-6 if dtype == torch.float32 else 1e-13, atol=0)


def test_a_solution_that_is_not_finite_has_no_finite_norm() -> None:
    slopes, x = ode.normal(7, 2, 10), ode.normal(2, 10)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[1, 3] = value
        norm = error_norm_(slopes, broken, ode.numbers(2), DOPRI5.coupling[6], DOPRI5.error, ode.tolerance())
        assert norm.isfinite().tolist() == [True, value == torch.inf]  # an infinite scale: the error counts for nothing
        broken_slopes = slopes.clone()
        broken_slopes[4, 0, 2] = value
        norm = error_norm_(broken_slopes, x, ode.numbers(2), DOPRI5.coupling[6], DOPRI5.error, ode.tolerance())
        assert norm.isfinite().tolist() == [False, True]


# --- the controller ----------------------------------------------------------------------------------------

RATIOS = [0.0, 1e-300, 1e-9, 0.3, 0.999, 1.0, 1.0 + 2**-52, 1.5, 1e5, 1e300, np.inf, np.nan]


@packs.draws(60)
@given(data=st.data())
def test_controller_agrees_with_one_image_at_a_time(data: st.DataObject) -> None:
    images = data.draw(st.integers(0, 5))

    def column(of: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(data.draw(st.lists(of, min_size=images, max_size=images)), dtype=dtype)

    tau = column(st.one_of(st.sampled_from([0.0, 1.0, 1 - 2.0**-53, 0.5]), st.floats(0, 1)), F64)
    step = column(st.one_of(st.sampled_from([1e-20, 0.5, 10.0, torch.inf]), st.floats(1e-6, 1)), F64)
    status = column(st.sampled_from([RUNNING] * 5 + [ARRIVED, UNDERFLOW]), torch.int32)
    accepted, rejected = (column(st.integers(0, 5), torch.int64) for _ in range(2))
    ratio = column(st.one_of(st.sampled_from(RATIOS), st.floats(0, 3)), F64)
    limit = data.draw(st.integers(1, 12))
    rows = zip(
        tau.tolist(), step.tolist(), status.tolist(), accepted.tolist(), rejected.tolist(), ratio.tolist(), strict=True
    )
    expected = [ode.attempt_by_hand(t, s, z, (a, r), e, 5, limit) for t, s, z, a, r, e in rows]
    h, times, accept = torch.zeros(images, dtype=F64), torch.zeros(7, images, dtype=F64), torch.zeros(images).bool()
    begin_attempt_(h, times, tau, step, status, DOPRI5.nodes)
    end_attempt_(tau, step, status, accepted, rejected, accept, h, times, ratio, order=5, max_attempts=limit)
    for b, (h_b, tau_b, step_b, times_b, status_b, counts_b, accept_b) in enumerate(expected):
        assert (h[b].item(), tau[b].item(), times[:, b].tolist()) == (h_b, tau_b, times_b)
        assert (status[b].item(), accept[b].item()) == (status_b, accept_b)
        assert (accepted[b].item(), rejected[b].item()) == counts_b
        assert step[b].item() == pytest.approx(step_b, rel=1e-14)


def test_statuses_are_the_same_in_the_kernels() -> None:
    names = ("RUNNING", "ARRIVED", "MAX_ATTEMPTS", "UNDERFLOW", "NONFINITE")
    assert [getattr(control_kernels, n).value for n in names] == [RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW, NONFINITE]


def test_accepted_images_move_and_the_others_do_not() -> None:
    x, slopes, solution = ode.hostile(*SHAPE), ode.hostile(7, *SHAPE, seed=1), ode.hostile(*SHAPE, seed=2)
    accept = torch.tensor([True, False, True])
    before, slopes_before = x.clone(), slopes.clone()
    take_accepted_(x, slopes, solution, accept)
    for b, moved in enumerate(accept.tolist()):
        assert_same_bits(x[b], solution[b] if moved else before[b])
        assert_same_bits(slopes[0, b], slopes_before[6 if moved else 0, b])
    assert_same_bits(slopes[1:], slopes_before[1:])


# --- a whole integration -----------------------------------------------------------------------------------


def integrate(x: Tensor, field: ode.Field, weight: float | None, batch_wide: bool, extra: int = 0) -> Adaptive:
    state = Adaptive.around(x.clone(), len(field.paces), 7)
    start_(state, DOPRI5, field, weight, batch_wide=batch_wide)
    while bool((state.status == RUNNING).any()):
        attempt_(state, DOPRI5, field, weight, batch_wide=batch_wide)
    for _ in range(extra):
        attempt_(state, DOPRI5, field, weight, batch_wide=batch_wide)
    return state


@pytest.mark.parametrize("batch_wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("weight", [None, 2.4])
def test_every_attempt_has_the_bits_of_the_engines_solver(
    batch_wide: bool, dtype: torch.dtype, weight: float | None
) -> None:
    """States, slopes, times and steps, and the times at which the field is called."""
    x, paces = ode.normal(*SHAPE, dtype=dtype), (0.5, 4.0, 12.0)
    theirs, ours = ode.Field(paces, weight), ode.Field(paces, weight)
    history: list[solvers.AdaptiveState] = []
    tolerance = solvers.Tolerance(error_norm="batch" if batch_wide else "image")
    solvers.integrate_adaptive(theirs.combined, x, DOPRI5, tolerance, history.append)
    state = Adaptive.around(x.clone(), 3, 7)
    start_(state, DOPRI5, ours, weight, batch_wide=batch_wide)
    for expected in history:
        assert (state.status == RUNNING).any()
        attempt_(state, DOPRI5, ours, weight, batch_wide=batch_wide)
        for name in ("x", "tau", "step", "accepted", "rejected"):
            assert_same_bits(getattr(state, name), getattr(expected, name), name)
        assert_same_bits(state.slopes[0], expected.slope, "slope")
    assert state.status.tolist() == [ARRIVED] * 3
    assert len(ours.times) == len(theirs.times) == 2 + 6 * len(history)
    assert all(same_bits(a, b) for a, b in zip(ours.times, theirs.times, strict=True))
    assert int(state.rejected.sum()) > 0
    assert batch_wide == (len(set(state.accepted.tolist())) == 1)


def test_token_layout_takes_the_same_steps() -> None:
    """Norms are summed in another order, so steps and states agree to rounding, not to the bit."""
    x, paces = ode.normal(*SHAPE, dtype=F64), (0.5, 4.0, 12.0)
    images = integrate(x, ode.Field(paces, 2.4), 2.4, False)
    there = torch.arange(x[0].numel()).view(1, *SHAPE[1:])
    order = patchify(there, 2).flatten()
    back = order.argsort()

    class Tokens(ode.Field):
        def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
            v = super().__call__(x.view(3, -1)[:, back].view(SHAPE), tau)
            return v.view(6, -1)[:, order].reshape(-1, 8)

    tokens = integrate(patchify(x, 2), Tokens(paces, 2.4), 2.4, False)
    assert tokens.accepted.tolist() == images.accepted.tolist()
    assert tokens.rejected.tolist() == images.rejected.tolist()
    torch.testing.assert_close(tokens.x, patchify(images.x, 2), rtol=0, atol=1e-10)


def test_an_arrived_image_stands_still_however_late_it_is_asked() -> None:
    x, paces = ode.normal(*SHAPE), (0.5, 4.0, 12.0)
    done = integrate(x, ode.Field(paces, None), None, False)
    later = integrate(x, ode.Field(paces, None), None, False, extra=3)
    for name in ("x", "tau", "step", "accepted", "rejected", "status"):
        assert_same_bits(getattr(later, name), getattr(done, name), name)


@pytest.mark.parametrize("when", ["from the start", "on the way"])
def test_one_images_nan_does_not_spoil_another(when: str) -> None:
    x, paces = ode.normal(*SHAPE), (0.5, 4.0, 12.0)
    good = integrate(x, ode.Field(paces, None), None, False)

    class Broken(ode.Field):
        def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
            v = super().__call__(x, tau)
            v[1] = torch.where(tau[1] > (0.4 if when == "on the way" else -1.0), torch.nan, v[1])
            return v

    state = integrate(x, Broken(paces, None), None, False)
    assert state.status.tolist() == [ARRIVED, NONFINITE, ARRIVED]
    for b in (0, 2):
        assert_same_bits(state.x[b], good.x[b])
        assert state.accepted[b] == good.accepted[b]
    assert state.x[1].isfinite().all()  # the last state that was accepted
    if when == "on the way":
        assert 0 < state.tau[1] < 0.4
    together = integrate(x, Broken(paces, None), None, True)
    assert together.status.tolist() == [NONFINITE] * 3  # a shared norm is shared


def test_attempts_are_limited_and_vanishing_steps_noticed() -> None:
    field = ode.Field((0.5, 40.0), None)
    state = Adaptive.around(ode.normal(2, 30), 2, 7)
    start_(state, DOPRI5, field)
    for _ in range(8):
        attempt_(state, DOPRI5, field, max_attempts=8)
    assert state.status.tolist() == [ARRIVED, MAX_ATTEMPTS]
    assert int(state.accepted[1] + state.rejected[1]) == 8
    assert state.tau[1] < 1
    state = Adaptive.around(ode.normal(2, 30), 2, 7)
    start_(state, DOPRI5, field)
    state.tau.fill_(0.5)
    state.step[0] = 1e-17
    attempt_(state, DOPRI5, field)
    assert state.status.tolist() == [UNDERFLOW, RUNNING]
    assert state.tau[0] == 0.5


@pytest.mark.parametrize("rtol", [1e-3, 1e-7])
def test_a_closed_form_is_reached_within_tolerance(rtol: float) -> None:
    """``dx/dtau = r x`` for a rate per image."""
    x, rates = 1 + ode.numbers(3)[:, None].expand(3, 5).contiguous(), torch.tensor([-3.0, 0.5, 2.0], dtype=F64)
    state = Adaptive.around(x.clone(), 3, 7, rtol=rtol, atol=1e-9)
    start_(state, DOPRI5, lambda y, tau: rates[:, None] * y)
    for _ in range(40):
        attempt_(state, DOPRI5, lambda y, tau: rates[:, None] * y)
    assert state.status.tolist() == [ARRIVED] * 3
    torch.testing.assert_close(state.x, x * rates.exp()[:, None], rtol=10 * rtol, atol=0)


def test_an_attempt_never_asks_the_device() -> None:
    """Fake tensors have no values: reading one on the host would raise."""
    with FakeTensorMode(), torch.no_grad():
        state = Adaptive.around(torch.empty(4, 10), 4, 7)
        start_(state, DOPRI5, lambda y, tau: torch.cat([y, y]) * tau.repeat(2)[:, None].float(), 2.4)
        before = [id(t) for t in state.tensors()]
        attempt_(state, DOPRI5, lambda y, tau: torch.cat([y, y]), 2.4)
        assert [id(t) for t in state.tensors()] == before


def test_empty_batches() -> None:
    x, slopes, none = torch.zeros(0, 5), torch.zeros(7, 0, 5), torch.zeros(0, dtype=F64)
    assert euler_step(x, x, none).shape == (0, 5)
    assert euler_step(x, x, 0.1, 2.4).shape == (0, 5)
    assert euler_step(x, x, torch.tensor([0.1]), torch.tensor([2.4])).shape == (0, 5)
    assert euler_step(x, x, torch.tensor([0.1]), none).shape == (0, 5)
    stage_state_(torch.empty_like(x), slopes, x, torch.tensor([0.1], dtype=F64), (0.5,), x, torch.tensor([2.4]))
    stage_state_(torch.empty_like(x), slopes, x, none, (0.5,), x, 2.0)
    assert integrate(x, ode.Field((), 2.4), 2.4, False).x.shape == (0, 5)
    assert integrate(x, ode.Field((), None), None, True, extra=1).x.shape == (0, 5)


# --- registration ------------------------------------------------------------------------------------------


def operands() -> dict[str, Any]:
    return {
        "x": ode.normal(2, 6),
        "slopes": ode.normal(7, 2, 6, seed=1),
        "velocity": ode.normal(4, 6, dtype=torch.bfloat16, seed=2),
        "step": ode.numbers(2),
        "guidance": torch.tensor([2.4], dtype=F64),
        "tolerance": ode.tolerance(),
        "status": torch.zeros(2, dtype=torch.int32),
        "counts": torch.zeros(2, dtype=torch.int64),
        "accept": torch.tensor([True, False]),
        "times": torch.rand(7, 2, dtype=F64),
    }


@pytest.mark.filterwarnings("ignore:.*functorch:FutureWarning")
def test_opcheck() -> None:
    o = operands()
    x, slopes, v, h, w, tol = (o[k] for k in ("x", "slopes", "velocity", "step", "guidance", "tolerance"))
    check = torch.library.opcheck
    for velocity, weight in ((v, w), (v[:2], None)):
        check(op._euler_step, (x, velocity, h, weight, 2))
        check(op._euler_step_in_place, (x.clone(), velocity, h, weight, 2))
        check(op._stage_state, (torch.empty_like(x), slopes.clone(), x, h, [0.5, 0.0, 1.5], velocity, weight, 2))
        rows = (list(DOPRI5.coupling[6]), list(DOPRI5.error))
        check(norms._error_norm, (slopes.clone(), x, h, *rows, tol, velocity, weight, True))
        check(norms._first_slope, (torch.empty_like(x), x, velocity, tol, weight, 2, False))
        check(norms._slope_change, (slopes[0], x, velocity, tol, weight, 2, False))
    check(op._stage_state, (torch.empty_like(x), slopes.clone(), x, h, [0.5], None, None, 2))
    tau, status, counts, accept, times = h.clone(), o["status"], o["counts"], o["accept"], o["times"]
    check(control._begin_attempt, (h.clone(), times, tau, h, status, list(DOPRI5.nodes)))
    updated = (tau, h.clone(), status, counts, counts.clone(), accept)
    check(control._end_attempt, (*updated, h, times, ode.numbers(2, 9), 5, 100))
    check(control._take_accepted, (x.clone(), slopes.clone(), slopes[3].clone(), accept))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    x, v, h = ode.normal(2, 6), ode.normal(4, 6, dtype=torch.bfloat16, seed=2), ode.numbers(2)

    def field(y: Tensor, tau: Tensor) -> Tensor:
        v = torch.tanh(y) * (1 + tau).to(y.dtype)[:, None]
        return torch.cat([v, 0.5 * v])

    def run(x: Tensor, v: Tensor, h: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        x = euler_step(x, v, h, 2.4)
        euler_step_(x, v[:2], h)
        out = torch.empty_like(x)
        stage_state_(out, slopes, x, h, (0.5, 0.25), v, 1.5)
        state = Adaptive.around(out, 2, 7)
        start_(state, DOPRI5, field, 2.4)
        attempt_(state, DOPRI5, field, 2.4)
        attempt_(state, DOPRI5, field, 2.4, batch_wide=True)
        return x, slopes, state.x, state.tau, state.step, state.accepted

    slopes = ode.normal(7, 2, 6, seed=1)
    expected = run(x.clone(), v, h, slopes.clone())
    got = torch.compile(run, fullgraph=True, backend=backend)(x.clone(), v, h, slopes.clone())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, dtype=torch.bfloat16)}, "x: got torch.bfloat16"),
        ({"x": torch.zeros(6, 2).T}, "x: got strides"),
        ({"x": torch.zeros(2, 6, requires_grad=True)}, "x: got a tensor that requires grad"),
        ({"x": torch.zeros(2, 0)}, "x: got shape"),
        ({"velocity": torch.zeros(4, 6, requires_grad=True)}, "velocity: got a tensor that requires grad.*no backward"),
        ({"velocity": torch.zeros(4, 6, dtype=F64)}, "velocity: got torch.float64"),
        ({"velocity": torch.zeros(4, 6, dtype=torch.int32)}, "velocity: got torch.int32"),
        ({"velocity": torch.zeros(2, 6)}, r"velocity: got shape \(2, 6\), expected 24 values.*with guidance"),
        ({"velocity": torch.zeros(3, 8)}, r"velocity: got shape \(3, 8\)"),
        ({"velocity": torch.zeros(4, 6), "guidance": None}, "expected 12 values.*without guidance"),
        ({"velocity": torch.zeros(6, 4).T}, "velocity: got strides"),
        ({"velocity": torch.zeros(1, 6).expand(4, 6)}, "velocity: got strides"),
        ({"velocity": torch.zeros(6, 5)[:, :4], "x": torch.zeros(2, 6)}, "velocity: got rows of 4"),
        ({"velocity": torch.zeros(4, 6, device="meta")}, "velocity: got device meta"),
        ({"step": torch.zeros(5)}, "step: got 5 images, expected a divisor of the 12 values"),
        ({"step": torch.zeros(0)}, "step: got 0 images"),
        ({"step": torch.zeros(2, 1)}, "step: got shape"),
        ({"step": torch.zeros(2, dtype=torch.bfloat16)}, "step: got torch.bfloat16"),
        ({"step": torch.zeros(4)[::2]}, "step: got strides"),
        ({"step": torch.zeros(2, device="meta")}, "step: got device meta"),
        ({"guidance": torch.zeros(3)}, "guidance: got 3 entries"),
        ({"guidance": torch.zeros(1, 2)}, "guidance: got shape"),
        ({"guidance": torch.zeros(2, dtype=torch.int64)}, "guidance: got torch.int64"),
    ],
)
def test_euler_refuses_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {k: operands()[k] for k in ("x", "velocity", "step", "guidance")} | change
    with pytest.raises(ValueError, match=message):
        euler_step(**arguments)
    with pytest.raises(ValueError, match=message):
        euler_step_(**arguments)


def test_a_state_that_is_too_large_is_refused_with_a_way_to_split_it() -> None:
    """Where step and guidance are numbers, all values count as one image."""
    x = torch.empty(3, 2**29, device="meta")
    with pytest.raises(ValueError, match=r"x: got .* in each of 1 images, .*: pass step as a tensor with one entry"):
        euler_step(x, x, 0.1)
    assert euler_step(x, x, torch.empty(3, device="meta")).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(2, 5)}, "out: got shape"),
        ({"out": torch.zeros(2, 6, dtype=F64)}, "out: got torch.float64"),
        ({"slopes": torch.zeros(2, 6)}, "slopes: got shape"),
        ({"slopes": torch.zeros(7, 2, 5)}, "slopes: got shape"),
        ({"slopes": torch.zeros(7, 2, 12)[..., ::2]}, "slopes: got strides"),
        ({"weights": ()}, "weights: got 0 weights"),
        ({"weights": (1.0,) * 8}, "weights: got 8 weights, expected 1 to 7"),
        ({"weights": (0.0, 0.0)}, "weights: got nothing but zeros"),
        ({"step": torch.zeros(2)}, "step: got torch.float32"),
        ({"velocity": torch.zeros(2, 6)}, "velocity: got shape"),
    ],
)
def test_stages_refuse_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {k: operands()[k] for k in ("x", "slopes", "velocity", "step", "guidance")}
    with pytest.raises(ValueError, match=message):
        stage_state_(**(arguments | {"out": torch.zeros(2, 6), "weights": (0.5,)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": DOPRI5.error[:5]}, "error: got 5 weights, expected one for each of 7"),
        ({"solution": (0.0,)}, "solution: got nothing but zeros"),
        ({"tolerance": torch.zeros(3, dtype=F64)}, "tolerance: got 3 entries"),
        ({"tolerance": torch.zeros(2)}, "tolerance: got torch.float32"),
        ({"slopes": torch.zeros(7, 2, 6, dtype=F64)}, "slopes: got torch.float64"),
        ({"step": torch.zeros(5, dtype=F64)}, "step: got 5 images"),
    ],
)
def test_norms_refuse_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {k: operands()[k] for k in ("x", "slopes", "velocity", "step", "guidance", "tolerance")}
    arguments |= {"solution": DOPRI5.coupling[6], "error": DOPRI5.error} | change
    with pytest.raises(ValueError, match=message):
        error_norm_(**arguments)


def test_the_others_refuse_by_name() -> None:
    o = operands()
    x, v, tol, h = o["x"], o["velocity"], o["tolerance"], o["step"]
    with pytest.raises(ValueError, match="slope: got shape"):
        first_slope_(torch.zeros(2, 5), x, v, tol, 2, 2.4)
    with pytest.raises(ValueError, match="images: got 5 images"):
        slope_change(x.clone(), x, v, tol, 5, 2.4)
    with pytest.raises(ValueError, match="solution: got shape"):
        take_accepted_(x, o["slopes"], torch.zeros(2, 5), o["accept"])
    with pytest.raises(ValueError, match=r"accept: got torch\.float64"):
        take_accepted_(x, o["slopes"], x.clone(), h)
    with pytest.raises(ValueError, match="accept: got 5 images"):
        take_accepted_(x, o["slopes"], x.clone(), torch.zeros(5, dtype=torch.bool))
    begin = {"h": h.clone(), "times": o["times"], "tau": h, "step": h, "status": o["status"], "nodes": DOPRI5.nodes}
    for change, message in (
        ({"h": torch.zeros(3, dtype=F64)}, "h: got 3 entries"),
        ({"step": h.float()}, "step: got torch.float32"),
        ({"status": o["counts"]}, "status: got torch.int64"),
        ({"times": o["times"][:6]}, "times: got shape"),
        ({"times": o["times"].float()}, "times: got torch.float32"),
        ({"nodes": (0.0, 0.5)}, "nodes: got"),
    ):
        with pytest.raises(ValueError, match=message):
            begin_attempt_(**(begin | change))
    end: dict[str, Any] = {k: v for k, v in begin.items() if k != "nodes"}
    end |= {"accepted": o["counts"], "rejected": o["counts"].clone(), "accept": o["accept"], "ratio": h}
    end |= {"order": 5, "max_attempts": 10}
    for change, message in (
        ({"accepted": o["status"]}, "accepted: got torch.int32"),
        ({"accept": o["status"]}, "accept: got torch.int32"),
        ({"ratio": torch.zeros(3, dtype=F64)}, "ratio: got 3 entries"),
        ({"order": 0}, "order: got 0"),
        ({"max_attempts": 0}, "max_attempts: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            end_attempt_(**(end | change))
    nan, inf = math.nan, math.inf
    for rtol, atol in ((0.0, 0.0), (-1e-3, 1e-3), (nan, 1e-6), (1e-3, nan), (inf, 0.0), (1e-3, inf)):
        with pytest.raises(ValueError, match=rf"^rtol, atol: got {rtol}, {atol}, expected finite numbers of 0 or more"):
            Adaptive.around(x, 2, 7, rtol=rtol, atol=atol)
    state = replace(Adaptive.around(x, 2, 7), tolerance=torch.zeros(2))
    with pytest.raises(ValueError, match=r"tolerance: got torch\.float32"):
        start_(state, DOPRI5, lambda y, tau: y)


def test_a_tensor_that_requires_grad_is_taken_where_no_gradient_is_asked_for() -> None:
    x, v = ode.normal(2, 6), ode.normal(2, 6, seed=1).requires_grad_()
    with torch.no_grad():
        assert_same_bits(euler_step(x, v, 0.1), euler_step(x, v.detach(), 0.1))
