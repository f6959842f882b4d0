"""The compiled ode_step kernels on a device: updates level A, norms levels C and D, attempts replayed from a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import solvers
from pixelflow_engine.layers import patchify
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import (
    ARRIVED,
    RUNNING,
    Adaptive,
    attempt_,
    begin_attempt_,
    end_attempt_,
    error_norm_,
    euler_step,
    euler_step_,
    first_slope_,
    reference,
    slope_change,
    stage_state_,
    start_,
    take_accepted_,
)
from support import ode
from support.kernels import assert_filled, assert_same_bits, differing_bits, poisoned_like, same_bits

pytestmark = pytest.mark.gpu

F64 = torch.float64
VELOCITIES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 1001), (16, 3, 32, 32), (4, 3, 256, 256)]
CUDA = "cuda"


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, both halves, a step and a weight per image, on the device; any bits at all."""
    x = ode.hostile(*shape, seed=seed).to(CUDA)
    both = ode.hostile(2 * shape[0], *shape[1:], dtype=dtype, seed=seed + 1).to(CUDA)
    return x, both, ode.numbers(shape[0], seed).to(CUDA), (3 * ode.numbers(shape[0], seed + 1) - 1).to(CUDA)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", VELOCITIES)
@pytest.mark.parametrize("guided", [False, True])
def test_euler_has_the_bits_of_eager_pytorch(shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> None:
    """Eager on the same device, written out here with numbers as the sampler has them; dense, sliced, in place."""
    x, both, step, weights = inputs(shape, dtype)
    n = shape[0]
    velocity = both if guided else both[:n]
    dt = torch.tensor([0.3, 0.4], device=CUDA).diff()
    high = velocity.float()
    v = high[:n] + 2.4 * (high[n:] - high[:n]) if guided else high
    assert_same_bits(euler_step(x, velocity, dt, 2.4 if guided else None), x + dt * v)
    expected = reference.euler(x, velocity, step, weights if guided else None, n)
    out = euler_step(x, velocity, step, weights if guided else None)
    assert_same_bits(out, expected)
    values = x[0].numel()
    width = next(w for w in (48, 7, 1) if values % w == 0)
    taken = ode.sliced(velocity, width)
    assert_same_bits(euler_step(x, taken, step, weights if guided else None), expected)
    buffer, inside = poisoned_like(x, dense=True)
    inside.copy_(x)
    euler_step_(inside, velocity, step, weights if guided else None)
    assert_same_bits(inside, expected)
    assert_filled(buffer, inside)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", VELOCITIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_stages_have_the_bits_of_eager_pytorch(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    x, both, step, weights = inputs(shape, dtype)
    buffer, slopes = poisoned_like(x.expand(7, *x.shape), dense=True)
    slopes[:count] = ode.hostile(count, *shape, seed=5).to(CUDA)
    row = DOPRI5.coupling[count]
    for velocity, w in ((None, None), (both[: shape[0]], None), (both, weights)):
        expected = slopes[:count].clone()
        if velocity is not None:
            expected[-1] = reference.guided(velocity, w, shape[0], torch.float32).view(shape)
        out_buffer, out = poisoned_like(x, dense=True)
        stage_state_(out, slopes, x, step, row, velocity, w)
        assert_same_bits(slopes[:count], expected, "slopes")
        assert_same_bits(out, reference.stage_state(x, expected, step, row))
        assert_filled(out_buffer, out)
    assert_filled(buffer, slopes[:count], "slopes")


@pytest.mark.parametrize("dtype", VELOCITIES)
def test_ten_million_values(dtype: torch.dtype) -> None:
    """0 differing bits: guidance + Euler, Euler alone, guidance + stage, and the slope that it stores."""
    shape, differing = (51, 3, 256, 256), 0
    x, both, step, weights = inputs(shape, dtype, seed=7)
    assert x.numel() > 10**7
    for velocity, w in ((both, weights), (both[: shape[0]], None)):
        out = euler_step(x, velocity, step, w)
        differing += int(differing_bits(out, reference.euler(x, velocity, step, w, shape[0])).sum())
    slopes = ode.hostile(5, *shape, seed=11).to(CUDA)
    row = DOPRI5.coupling[5]
    stage_state_(out, slopes, x, step, row, both, weights)
    slope = reference.guided(both, weights, shape[0], torch.float32).view(shape)
    differing += int(differing_bits(slopes[4], slope).sum())
    differing += int(differing_bits(out, reference.stage_state(x, slopes, step, row)).sum())
    assert differing == 0


def test_float64() -> None:
    x, both, step, weights = (t.double() for t in inputs((3, 1001), torch.float32))
    assert_same_bits(euler_step(x, both, step, weights), reference.euler(x, both, step, weights, 3))
    slopes, out = ode.hostile(7, 3, 1001, dtype=F64).to(CUDA), torch.empty_like(x)
    stage_state_(out, slopes, x, step, DOPRI5.coupling[6], both, weights)
    assert_same_bits(out, reference.stage_state(x, slopes, step, DOPRI5.coupling[6]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", VELOCITIES)
@pytest.mark.parametrize("batch_wide", [False, True])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, batch_wide: bool) -> None:
    """Against float64 on the CPU; slopes to the bit; the same bits twice; per image, the same bits alone."""
    images = shape[0]
    x, slopes = ode.normal(*shape).to(CUDA), ode.normal(7, *shape, seed=1).to(CUDA)
    both, step = ode.normal(2 * images, *shape[1:], dtype=dtype, seed=2).to(CUDA), ode.numbers(images).to(CUDA)
    weights, tolerance = (3 * ode.numbers(images, 4)).to(CUDA), ode.tolerance(CUDA)
    slope = reference.guided(both, weights, images, torch.float32).view(shape)
    tableau = (DOPRI5.coupling[6], DOPRI5.error)
    again = slopes.clone()
    out = error_norm_(slopes, x, step, *tableau, tolerance, both, weights, batch_wide=batch_wide)
    assert_same_bits(slopes[6], slope, "slope")
    assert_same_bits(slopes[:6], again[:6], "slopes")
    assert_same_bits(error_norm_(again, x, step, *tableau, tolerance, both, weights, batch_wide=batch_wide), out)
    plain = reference.error_norm(x, slopes, step, *tableau, tolerance, batch_wide)
    high = slopes.double().cpu().numpy().reshape(7, images, -1)
    ode.assert_norms(out, plain, ode.error64(x, high, step.tolist(), batch_wide), torch.float32, ulps=4)
    if not batch_wide:
        one = slice(images - 1, images)
        its_halves = torch.cat([half[one] for half in both.chunk(2)])
        its_slopes = slopes[:, one].contiguous()
        alone = error_norm_(its_slopes, x[one], step[one], *tableau, tolerance, its_halves, weights[one])
        assert_same_bits(alone, out[one])

    buffer, stored = poisoned_like(x, dense=True)
    norms = first_slope_(stored, x, both, tolerance, images, weights, batch_wide=batch_wide)
    assert_same_bits(stored, slope, "slope")
    assert_filled(buffer, stored)
    change = slope_change(slopes[1], x, both, tolerance, images, weights, batch_wide=batch_wide)
    rtol, atol = ode.TOLERANCE
    rows, v = (y.double().cpu().view(images, -1).numpy() for y in (x, slope))
    plains = [
        *reference.start_norms(x, slope, None, tolerance, images, batch_wide),
        *reference.start_norms(x, slopes[1], slope, tolerance, images, batch_wide),
    ]
    for got, plain, y in zip((*norms, change), plains, (rows, v, v - high[1]), strict=True):
        truth = ode.rms64(y, atol + rtol * abs(rows), batch_wide)
        ode.assert_norms(got, plain, truth, torch.float32, ulps=4)


def test_a_solution_that_is_not_a_number_has_no_norm() -> None:
    """Though its error has one; the interpreter cannot tell a maximum that drops NaN."""
    x, slopes, step = ode.normal(2, 50).to(CUDA), ode.normal(2, 2, 50, seed=1).to(CUDA), ode.numbers(2).to(CUDA)
    slopes[0, 0, 3] = torch.nan
    norms = error_norm_(slopes, x, step, (1.0,), (0.0, 1.0), ode.tolerance(CUDA))
    assert norms.isnan().tolist() == [True, False]


@pytest.mark.parametrize("images", [1, 16, 33])
def test_controller(images: int) -> None:
    """Bits of the plain controller on the same device, but for the next step: 1e-14."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tau = torch.rand(images, generator=generator, dtype=F64).to(CUDA)
        step = (2 * torch.rand(images, generator=generator, dtype=F64) ** 3).to(CUDA)
        status = (torch.rand(images, generator=generator) < 0.2).int().to(CUDA)
        accepted, rejected = torch.randint(0, 5, (2, images), generator=generator).to(CUDA)
        ratio = 10 ** (4 * torch.randn(images, generator=generator, dtype=F64))
        ratio[torch.rand(images, generator=generator) < 0.2] = torch.nan
        ratio[torch.rand(images, generator=generator) < 0.2] = 0.0
        ratio = ratio.to(CUDA)
        h, times = torch.empty_like(tau), torch.empty(7, images, dtype=F64, device=CUDA)
        begin_attempt_(h, times, tau, step, status, DOPRI5.nodes)
        for out, expected in zip((h, times), reference.begin_attempt(tau, step, status, DOPRI5.nodes), strict=True):
            assert_same_bits(out, expected)
        now = (tau, step, status, accepted, rejected)
        expected_now = reference.end_attempt(*now, h, times[-1], ratio, 5, 7)
        accept = torch.empty(images, dtype=torch.bool, device=CUDA)
        end_attempt_(*now, accept, h, times, ratio, order=5, max_attempts=7)
        for i, (out, expected) in enumerate(zip((*now, accept), expected_now, strict=True)):
            if i == 1:
                torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
            else:
                assert torch.equal(out, expected)


def test_accepted_images_move_and_the_others_do_not() -> None:
    x, slopes, solution = (ode.hostile(*s, 1001, seed=i).to(CUDA) for i, s in enumerate([(3,), (7, 3), (3,)]))
    accept = torch.tensor([True, False, True], device=CUDA)
    expected = torch.where(accept[:, None], solution, x), slopes.clone()
    expected[1][0] = torch.where(accept[:, None], slopes[6], slopes[0])
    take_accepted_(x, slopes, solution, accept)
    assert_same_bits(x, expected[0])
    assert_same_bits(slopes, expected[1])


def integration(x: Tensor, field: ode.Field, **options: Any) -> Adaptive:
    state = Adaptive.around(x.clone(), x.shape[0], 7)
    start_(state, DOPRI5, field, 2.4, **options)
    while bool((state.status == RUNNING).any()):
        attempt_(state, DOPRI5, field, 2.4, **options)
    return state


@pytest.mark.parametrize("batch_wide", [False, True])
def test_each_attempt_decides_as_the_engines_solver_does(batch_wide: bool) -> None:
    """From the same state, on the same device: bits of the new state, slope and time, and the same decision."""
    paces = (0.5, 4.0, 12.0)
    x, field = ode.normal(3, 3, 64, 64).to(CUDA), ode.Field(paces, 2.4, torch.bfloat16)
    history: list[solvers.AdaptiveState] = []
    tolerance = solvers.Tolerance(error_norm="batch" if batch_wide else "image")
    solvers.integrate_adaptive(field.combined, x, DOPRI5, tolerance, history.append)
    state = Adaptive.around(x.clone(), 3, 7)
    start_(state, DOPRI5, field, 2.4, batch_wide=batch_wide)
    first = solvers._start(field.combined, x, DOPRI5, tolerance)
    torch.testing.assert_close(state.step, first.step, rtol=1e-3, atol=0)
    for before, after in zip([first, *history[:-1]], history, strict=True):
        for name in ("x", "tau", "step", "accepted", "rejected"):
            getattr(state, name).copy_(getattr(before, name))
        state.slopes[0].copy_(before.slope)
        state.status.fill_(RUNNING)
        attempt_(state, DOPRI5, field, 2.4, batch_wide=batch_wide)
        for name in ("x", "tau", "accepted", "rejected"):
            assert_same_bits(getattr(state, name), getattr(after, name), name)
        assert_same_bits(state.slopes[0], after.slope, "slope")
    assert (state.tau == 1).all()


def test_images_integrate_alone_as_in_a_batch_and_in_tokens_alike() -> None:
    paces = (0.5, 2.0, 5.0)
    x = ode.normal(3, 3, 64, 64).to(CUDA)
    together = integration(x, ode.Field(paces, 2.4))
    assert together.status.tolist() == [ARRIVED] * 3
    for b in range(3):
        alone = integration(x[b : b + 1], ode.Field(paces[b : b + 1], 2.4))
        for name in ("x", "tau", "step", "accepted", "rejected"):
            assert_same_bits(getattr(alone, name)[0], getattr(together, name)[b], name)
    both, step = torch.cat([x, 2 * x]).bfloat16(), ode.numbers(3).to(CUDA)
    tokens = patchify(euler_step(x, both, step, 2.4), 4)
    assert_same_bits(euler_step(patchify(x, 4), ode.sliced(patchify(both, 4), 48), step, 2.4), tokens)


def test_an_attempt_asks_nothing_and_replays_from_a_graph() -> None:
    """Without a synchronisation; replays have the bits of launches; images that have arrived stand still."""
    x = ode.normal(3, 3, 64, 64).to(CUDA)
    paces = torch.tensor([0.5, 2.0, 5.0], device=CUDA)[:, None]
    guidance = torch.tensor([2.4], dtype=F64, device=CUDA)

    def field(y: Tensor, tau: Tensor) -> Tensor:
        rows = y.view(3, -1)
        v = paces * (torch.tanh(rows.flip(1)) * torch.cos(5 * tau).float()[:, None] - 0.3 * rows)
        return torch.cat([0.5 * v + 0.1, v]).bfloat16()

    def prepared() -> Adaptive:
        state = Adaptive.around(x.clone(), 3, 7)
        start_(state, DOPRI5, field, guidance)
        return state

    eager, replayed = prepared(), prepared()
    attempt_(eager, DOPRI5, field, guidance)  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        start_(eager, DOPRI5, field, guidance)
        eager.x.copy_(x)
        start_(eager, DOPRI5, field, guidance)
        attempt_(eager, DOPRI5, field, guidance)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        attempt_(replayed, DOPRI5, field, guidance)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    for _ in range(30):
        for a, b in zip(eager.tensors(), replayed.tensors(), strict=True):
            assert torch.equal(a, b) if a.dtype == torch.bool else same_bits(a, b)
        attempt_(eager, DOPRI5, field, guidance)
        graph.replay()
    assert replayed.status.tolist() == [ARRIVED] * 3
