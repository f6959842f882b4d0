"""The compiled ode_step kernels, emulated: updates level A, norms levels C and D, the controller to a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelflow_engine import solvers
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import (
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
from support.compiled import by_arch, compiled_for, compiles
from support.kernels import assert_filled, assert_same_bits, poisoned_like

pytestmark = [
    compiles,
    by_arch,
    # numpy's, about infinities and NaN put in on purpose
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

F32, F64 = torch.float32, torch.float64
TABLEAU = (DOPRI5.coupling[6], DOPRI5.error)
# Types of the state and of the velocity.
TYPES = [(F32, torch.bfloat16), (F32, torch.float16), (F32, F32), (F64, F64)]
by_types = pytest.mark.parametrize(("high", "low"), TYPES)


def inputs(
    shape: tuple[int, ...], high: torch.dtype, low: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, both halves, a step and a weight per image; any bits at all."""
    x = ode.hostile(*shape, dtype=high, seed=seed)
    both = ode.hostile(2 * shape[0], *shape[1:], dtype=low, seed=seed + 1)
    return x, both, ode.numbers(shape[0], seed), 3 * ode.numbers(shape[0], seed + 1) - 1


# --- updates: level A --------------------------------------------------------------------------------------


@by_types
def test_euler_has_the_bits_of_eager_pytorch(arch: int, high: torch.dtype, low: torch.dtype) -> None:
    """Guided and dense, into a new state and in place, with a step and a weight per image."""
    shape = (3, 1001)
    x, both, step, weights = inputs(shape, high, low)
    buffer, inside = poisoned_like(x, dense=True)
    inside.copy_(x)
    with compiled_for(arch) as gpu:
        out = euler_step(x, both, step, weights)
        euler_step_(inside, both, step, weights)
    assert gpu.launched == {"_euler_kernel": 2}
    expected = reference.euler(x, both, step, weights, 3)
    assert_same_bits(out, expected)
    assert_same_bits(inside, expected)
    assert_filled(buffer, inside)


@pytest.mark.parametrize("guided", [False, True])
def test_euler_from_the_middle_of_wider_rows(arch: int, guided: bool) -> None:
    """Of 12 values of 16 that are known to be aligned, and of 7 that are not; numbers for all images."""
    for width, rows in ((48, 22), (7, 5)):
        x, both, _, _ = inputs((3 * rows, width), F32, torch.bfloat16)
        velocity = both if guided else both[: 3 * rows]
        step, w = torch.tensor([0.3, 0.4]).diff(), torch.tensor([2.4, 0.5, 1.0]) if guided else None
        with compiled_for(arch) as gpu:
            out = euler_step(x, ode.sliced(velocity, width), step.expand(3).contiguous(), w)
        assert gpu.launched == {"_euler_kernel": 1}
        assert_same_bits(out, reference.euler(x, velocity, step, w, 3))


def test_one_step_for_all_and_places_that_are_not_aligned(arch: int) -> None:
    """The state begins one value after a multiple of 16 bytes, the velocity too."""
    x, both, step, weights = inputs((1, 1537), F32, torch.bfloat16)
    wide, velocity = torch.empty(1, 1538), torch.empty(2 * 1537 + 1, dtype=torch.bfloat16)
    wide[:, 1:], velocity[1:] = x, both.flatten()
    with compiled_for(arch) as gpu:
        out = euler_step(wide[:, 1:], velocity[1:].view(both.shape), step, weights)
        large = euler_step(x.expand(20, -1).reshape(1, -1), both[:1].expand(20, -1).reshape(1, -1), step)
    assert gpu.launched == {"_euler_kernel": 2}
    assert_same_bits(out, reference.euler(x, both, step, weights, 1))
    assert_same_bits(large.view(20, -1)[7:8], reference.euler(x, both[:1], step, None, 1))


@by_types
def test_stages_have_the_bits_of_eager_pytorch(arch: int, high: torch.dtype, low: torch.dtype) -> None:
    """The last slope is a new one, which is stored, and nothing else is."""
    x, both, step, weights = inputs((3, 1001), high, low)
    buffer, slopes = poisoned_like(x.expand(7, *x.shape), dense=True)
    slopes[:4] = ode.hostile(4, *x.shape, dtype=high, seed=5)
    expected = torch.cat([slopes[:4], reference.guided(both, weights, 3, high).view(1, *x.shape)])
    out_buffer, out = poisoned_like(x, dense=True)
    with compiled_for(arch) as gpu:
        stage_state_(out, slopes, x, step, DOPRI5.coupling[5], both, weights)
    assert gpu.launched == {"_stage_kernel": 1}
    assert_same_bits(slopes[:5], expected, "slopes")
    assert_filled(buffer, slopes[:5], "slopes")
    assert_same_bits(out, reference.stage_state(x, expected, step, DOPRI5.coupling[5]))
    assert_filled(out_buffer, out)


@pytest.mark.parametrize(
    "row", [DOPRI5.coupling[1], DOPRI5.coupling[6], (0.0, -0.5, 0.0, 1.5)], ids=["first", "solution", "gaps"]
)
def test_stages_of_stored_slopes(arch: int, row: tuple[float, ...]) -> None:
    """Also of images of a large size, whose configuration is another."""
    for shape in ((3, 50), (1, 16385)):
        x, _, step, _ = inputs(shape, F32, F32)
        slopes = ode.hostile(7, *shape, seed=5)
        kept = slopes.clone()
        buffer, out = poisoned_like(x, dense=True)
        with compiled_for(arch) as gpu:
            stage_state_(out, slopes, x, step, row)
        assert gpu.launched == {"_stage_kernel": 1}
        assert_same_bits(out, reference.stage_state(x, slopes, step, row))
        assert_filled(buffer, out)
        assert_same_bits(slopes, kept)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_accepted_images_move_and_the_others_do_not(arch: int, dtype: torch.dtype) -> None:
    buffers = [poisoned_like(torch.empty(*s, 1001, dtype=dtype), dense=True) for s in ((3,), (7, 3))]
    (_, x), (_, slopes) = buffers
    x.copy_(ode.hostile(3, 1001, dtype=dtype))
    slopes.copy_(ode.hostile(7, 3, 1001, dtype=dtype, seed=1))
    solution, accept = ode.hostile(3, 1001, dtype=dtype, seed=2), torch.tensor([True, False, True])
    expected = torch.where(accept[:, None], solution, x), slopes.clone()
    expected[1][0] = torch.where(accept[:, None], slopes[6], slopes[0])
    with compiled_for(arch) as gpu:
        take_accepted_(x, slopes, solution, accept)
    assert gpu.launched == {"_accept_kernel": 1}
    for (buffer, out), y in zip(buffers, expected, strict=True):
        assert_same_bits(out, y)
        assert_filled(buffer, out)


# --- norms: levels C and D ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_wide", [False, True])
@pytest.mark.parametrize(("high", "low"), [(F32, torch.bfloat16), (F64, F64)])
def test_norms(arch: int, high: torch.dtype, low: torch.dtype, batch_wide: bool) -> None:
    """The error's, and those that the first step needs; slopes are stored on the way, to the bit."""
    shape = (2, 1001)
    x, slopes = ode.normal(*shape, dtype=high), ode.normal(7, *shape, dtype=high, seed=1)
    both, step = ode.normal(4, 1001, dtype=low, seed=2), ode.numbers(2)
    weights, tolerance = 3 * ode.numbers(2, 4), ode.tolerance()
    slope = reference.guided(both, weights, 2, high).view(shape)
    kept, first = slopes[:6].clone(), slopes[1].clone()
    buffer, stored = poisoned_like(x, dense=True)
    with compiled_for(arch) as gpu:
        error = error_norm_(slopes, x, step, *TABLEAU, tolerance, both, weights, batch_wide=batch_wide)
        norms = first_slope_(stored, x, both, tolerance, 2, weights, batch_wide=batch_wide)
        bend = slope_change(slopes[1], x, both, tolerance, 2, weights, batch_wide=batch_wide)
    assert gpu.launched == {"_error_kernel": 1, "_start_kernel": 2, "_finish_kernel": 3}
    assert_same_bits(slopes, torch.cat([kept, slope[None]]), "slopes")
    assert_same_bits(stored, slope, "slope")
    assert_filled(buffer, stored)
    rtol, atol = ode.TOLERANCE
    every = slopes.double().numpy()
    scale = atol + rtol * x.double().abs().numpy()
    in_torch = [
        reference.error_norm(x, slopes, step, *TABLEAU, tolerance, batch_wide),
        *reference.start_norms(x, slope, None, tolerance, 2, batch_wide),
        *reference.start_norms(x, first, slope, tolerance, 2, batch_wide),
    ]
    truth = [ode.error64(x, every, step.tolist(), batch_wide)]
    for y in (x.double().numpy(), every[6], every[6] - every[1]):
        truth.append(ode.rms64(y, scale, batch_wide))
    for a, b, c in zip((error, *norms, bend), in_torch, truth, strict=True):
        ode.assert_norms(a, b, c, high, ulps=4)


def test_norms_of_stored_slopes_alone_and_beside_others(arch: int) -> None:
    """Level C, where an image has as many blocks as there are chunks of partial sums and more."""
    x, slopes, step = ode.normal(3, 1001), ode.normal(7, 3, 1001, seed=1), ode.numbers(3)

    def norm(images: slice, config: dict[str, int] | None) -> Tensor:
        from pixelflow_kernels.ode_step import norm_kernels

        some = slopes[:, images].contiguous()
        buffer, out = poisoned_like(step[images], dense=True)
        norm_kernels.launch_error(
            x[images], some, step[images], *TABLEAU, ode.tolerance(), None, None, out, False, config=config
        )  # fmt: skip
        assert_filled(buffer, out)
        return out

    with compiled_for(arch):
        for config in (None, {"BLOCK": 32, "num_warps": 1}):
            together = norm(slice(0, 3), config)
            assert_same_bits(norm(slice(1, 2), config), together[1:2])
            in_torch = reference.error_norm(x, slopes, step, *TABLEAU, ode.tolerance(), False)
            truth = ode.error64(x, slopes.double().numpy(), step.tolist(), False)
            ode.assert_norms(together, in_torch, truth, F32, ulps=4)


@pytest.mark.parametrize("batch_wide", [False, True])
def test_partial_sums_are_all_added(arch: int, batch_wide: bool) -> None:
    """More of them than a program adds at a time."""
    from pixelflow_kernels.ode_step import norm_kernels

    partial = 2.0 ** torch.arange(2 * 2 * 300, dtype=F64).remainder(50).view(2, 2, 300)
    buffer, out = poisoned_like(partial[..., 0], dense=True)
    with compiled_for(arch) as gpu:
        norm_kernels.launch_finish(partial, 7, out, batch_wide)
    assert gpu.launched == {"_finish_kernel": 1}
    assert_filled(buffer, out)
    sums = partial.sum((1, 2), keepdim=True).expand(2, 2, 1) / 14 if batch_wide else partial.sum(2, keepdim=True) / 7
    assert_same_bits(out, sums[..., 0].sqrt())


def test_a_solution_that_is_not_a_number_has_no_norm(arch: int) -> None:
    """Though its error has one: a maximum that drops NaN would hide it."""
    x, slopes, step = ode.normal(2, 50), ode.normal(2, 2, 50, seed=1), ode.numbers(2)
    slopes[0, 0, 3] = torch.nan
    with compiled_for(arch):
        norms = error_norm_(slopes, x, step, (1.0,), (0.0, 1.0), ode.tolerance())
    assert norms.isnan().tolist() == [True, False]


def test_lanes_beyond_an_image_do_not_count(arch: int) -> None:
    """They divide 0 by 0 where the absolute tolerance is 0."""
    x, slopes, step = 1 + ode.numbers(1202).float().view(2, 601), ode.normal(7, 2, 601), ode.numbers(2)
    relative = torch.tensor([1e-3, 0.0], dtype=F64)
    with compiled_for(arch):
        error = error_norm_(slopes, x, step, *TABLEAU, relative)
        norms = first_slope_(torch.empty_like(x), x, x, relative, 2)
    torch.testing.assert_close(
        error, reference.error_norm(x, slopes, step, *TABLEAU, relative, False), rtol=1e-6, atol=0
    )
    assert norms.isfinite().all()


# --- the controller ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 33])
def test_controller(arch: int, images: int) -> None:
    """Bits of the plain controller, but for the next step: 1e-14."""
    generator = torch.Generator().manual_seed(images)
    for _ in range(2):
        tau = torch.rand(images, generator=generator, dtype=F64)
        step = 2 * torch.rand(images, generator=generator, dtype=F64) ** 3
        status = (torch.rand(images, generator=generator) < 0.2).int()
        accepted, rejected = torch.randint(0, 5, (2, images), generator=generator).unbind()
        ratio = 10 ** (4 * torch.randn(images, generator=generator, dtype=F64))
        for value in (torch.nan, torch.inf, 0.0, 1.0):
            ratio[torch.rand(images, generator=generator) < 0.1] = value
        step[torch.rand(images, generator=generator) < 0.1] = 1e-20
        step[torch.rand(images, generator=generator) < 0.1] = torch.nan
        ratio[step.isnan()] = torch.nan  # as the norm of such a step is
        guarded = [poisoned_like(y, dense=True) for y in (tau, step, status, accepted, rejected)]
        for (_, out), y in zip(guarded, (tau, step, status, accepted, rejected), strict=True):
            out.copy_(y)
        now = [out for _, out in guarded]
        (h_buffer, h), (times_buffer, times) = (poisoned_like(y, dense=True) for y in (tau, tau.expand(7, images)))
        accept = torch.empty(images, dtype=torch.bool)
        with compiled_for(arch) as gpu:
            begin_attempt_(h, times, *now[:3], DOPRI5.nodes)
            expected = reference.end_attempt(tau, step, status, accepted, rejected, h, times[-1], ratio, 5, 7)
            end_attempt_(*now, accept, h, times, ratio, order=5, max_attempts=7)
        assert gpu.launched == {"_begin_kernel": 1, "_end_kernel": 1}
        assert_filled(h_buffer, h)
        assert_filled(times_buffer, times)
        for out, y in zip((h, times), reference.begin_attempt(tau, step, status, DOPRI5.nodes), strict=True):
            assert_same_bits(out, y)
        for i, ((buffer, out), y) in enumerate(zip(guarded, expected, strict=False)):
            if i == 1:
                torch.testing.assert_close(out, y, rtol=1e-14, atol=0, equal_nan=True)
            else:
                assert_same_bits(out, y)
            assert_filled(buffer, out)
        assert accept.tolist() == expected[5].tolist()


@pytest.mark.parametrize("batch_wide", [False, True])
def test_each_attempt_decides_as_the_engines_solver_does(arch: int, batch_wide: bool) -> None:
    """From the same state: bits of the new state, slope and time, the same decision; the next step to rounding."""
    x, field = ode.normal(3, 3, 4, 4), ode.Field((0.5, 4.0, 12.0), 2.4, torch.bfloat16)
    history: list[solvers.AdaptiveState] = []
    tolerance = solvers.Tolerance(error_norm="batch" if batch_wide else "image")
    solvers.integrate_adaptive(field.combined, x, DOPRI5, tolerance, history.append)
    state = Adaptive.around(x.clone(), 3, 7)
    first = solvers._start(field.combined, x, DOPRI5, tolerance)
    some = [*zip([first, *history[:-1]], history, strict=True)]
    some = [*some[:2], *(pair for pair in some[2:] if pair[1].rejected.sum() > pair[0].rejected.sum())][:3] + some[-1:]
    with compiled_for(arch) as gpu:
        start_(state, DOPRI5, field, 2.4, batch_wide=batch_wide)
        torch.testing.assert_close(state.step, first.step, rtol=1e-3, atol=0)
        for before, after in some:
            for name in ("x", "tau", "step", "accepted", "rejected"):
                getattr(state, name).copy_(getattr(before, name))
            state.slopes[0].copy_(before.slope)
            state.status.fill_(RUNNING)
            attempt_(state, DOPRI5, field, 2.4, batch_wide=batch_wide)
            for name in ("x", "tau", "accepted", "rejected"):
                assert_same_bits(getattr(state, name), getattr(after, name), name)
            assert_same_bits(state.slopes[0], after.slope, "slope")
            torch.testing.assert_close(state.step, after.step, rtol=1e-3, atol=0)
    assert (state.tau == 1).all()
    assert int(state.rejected.sum()) > 0
    names = ("start", "stage", "error", "finish", "begin", "end", "accept")
    assert set(gpu.launched) == {f"_{name}_kernel" for name in names}
