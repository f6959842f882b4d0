"""The ode_step kernels under Triton's interpreter, in fp32 and fp64: updates level A, norms levels C and D.

Outputs lie in poisoned buffers, so an element left unwritten or written beside the output shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_engine import solvers
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import (
    ARRIVED,
    NONFINITE,
    RUNNING,
    UNDERFLOW,
    Adaptive,
    attempt_,
    control,
    norms,
    op,
    reference,
    start_,
)
from support import ode, packs
from support.kernels import assert_filled, assert_same_bits, assert_untouched, differing_bits, plain, poisoned_like

pytestmark = [
    pytest.mark.interpret,
    # numpy's, about infinities and NaN put in on purpose
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

F64 = torch.float64
DTYPES = [torch.float32, F64]
SMALL = {"BLOCK": 16}
MILLION = {"BLOCK": 1 << 20}


@pytest.fixture(params=[False, True], ids=["", "apart"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of keeping products from being fused."""
    from pixelflow_kernels.ode_step import blocks

    if request.param:
        monkeypatch.setattr(blocks, "arch_of", lambda device: 100)


def halves(velocity: Tensor, guidance: Tensor | None) -> Tensor:
    return velocity if guidance is not None else velocity[: velocity.shape[0] // 2].clone()


# --- updates: level A --------------------------------------------------------------------------------------


@packs.draws(75)
@given(data=st.data())
def test_euler(data: st.DataObject) -> None:
    """Any number of images of any size, one step and weight or one each, dense or from a wider output; in place too."""
    from pixelflow_kernels.ode_step import kernels

    dtype, seed = data.draw(packs.interpreted_types()), data.draw(packs.seeds())
    images, width = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([1, 3, 12, 16, 48]))
    rows = data.draw(st.sampled_from([1, 2, 5]))
    shape = (images * rows, width)
    x = ode.hostile(*shape, dtype=dtype, seed=seed)
    # Half precision is widened, which the interpreter does faithfully; nothing is computed in it.
    velocity_type = data.draw(st.sampled_from([dtype, torch.float16]))
    velocity = ode.hostile(2 * shape[0], width, dtype=velocity_type, seed=seed + 1)
    each = [1, images] if images else [images]
    step = ode.numbers(data.draw(st.sampled_from(each)), seed)
    guidance = 3 * ode.numbers(data.draw(st.sampled_from(each)), seed + 1) - 1 if data.draw(st.booleans()) else None
    velocity = halves(velocity, guidance)
    taken = ode.sliced(velocity, width) if data.draw(st.booleans()) and images else velocity
    expected = reference.euler(x, velocity, step, guidance, images) if images else x
    buffer, out = poisoned_like(x, dense=True)
    kernels.launch_euler(x, taken, step, guidance, out, images, config=SMALL)
    assert_same_bits(out, expected)
    assert_filled(buffer, out)
    buffer, out = poisoned_like(x, dense=True)
    out.copy_(x)
    kernels.launch_euler(out, taken, step, guidance, out, images, config=SMALL)
    assert_same_bits(out, expected)
    assert_filled(buffer, out)


@packs.draws(75)
@given(data=st.data())
def test_stages(data: st.DataObject) -> None:
    """Every row of the tableau, from stored slopes alone or with a new one, which is stored and nothing else."""
    from pixelflow_kernels.ode_step import kernels

    dtype, seed = data.draw(packs.interpreted_types()), data.draw(packs.seeds())
    images, width, rows = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 12, 16])),
        data.draw(st.sampled_from([1, 3])),
    )
    count, fresh = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    gaps = (0.0, 0.0, -0.5, 0.0, 1.5, 1.0)  # zeros before, between
    weights = DOPRI5.coupling[count] if data.draw(st.booleans()) else (*gaps[: count - 1], -1.0)
    x = ode.hostile(images * rows, width, dtype=dtype, seed=seed)
    buffer, slopes = poisoned_like(x.expand(7, *x.shape), dense=True)
    stored = count - fresh
    slopes[:stored] = ode.hostile(stored, *x.shape, dtype=dtype, seed=seed + 1)
    step = ode.numbers(data.draw(st.sampled_from([1, images])), seed)
    guidance = 3 * ode.numbers(images, seed + 1) - 1 if fresh and data.draw(st.booleans()) else None
    velocity = None
    expected_slopes = slopes.clone()
    if fresh:
        velocity = halves(ode.hostile(2 * x.shape[0], width, dtype=dtype, seed=seed + 2), guidance)
        expected_slopes[count - 1] = reference.guided(velocity, guidance, images, dtype).view(x.shape)
        velocity = ode.sliced(velocity, width) if data.draw(st.booleans()) else velocity
    out_buffer, out = poisoned_like(x, dense=True)
    kernels.launch_stage(x, slopes, step, weights, velocity, guidance, out, images, config=SMALL)
    assert_same_bits(out, reference.stage_state(x, expected_slopes, step.expand(images), weights))
    assert_filled(out_buffer, out)
    assert_same_bits(slopes[:count], expected_slopes[:count], "slopes")
    written = slopes[:count]
    assert_filled(buffer, written, "slopes")


def test_guidance_kept_apart(apart: None) -> None:
    """The detour that products take on one architecture keeps every bit."""
    from pixelflow_kernels.ode_step import kernels

    x, both, slopes = ode.hostile(3, 50), ode.hostile(6, 50, seed=1), ode.hostile(7, 3, 50, seed=2)
    step, guidance, out = ode.numbers(3), 3 * ode.numbers(3, 4), torch.empty(3, 50)
    kernels.launch_euler(x, both, step, guidance, out, 3, config=SMALL)
    assert_same_bits(out, reference.euler(x, both, step, guidance, 3))
    kernels.launch_stage(x, slopes, step, DOPRI5.coupling[6], both, guidance, out, 3, config=SMALL)
    assert_same_bits(out, reference.stage_state(x, slopes, step, DOPRI5.coupling[6]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_values_of_euler(dtype: torch.dtype) -> None:
    from pixelflow_kernels.ode_step import kernels

    differing = 0
    for seed in range(5 if dtype == torch.float32 else 1):
        x, both = (
            ode.hostile(2, 1_000_001, dtype=dtype, seed=seed),
            ode.hostile(4, 1_000_001, dtype=dtype, seed=99 + seed),
        )
        step, guidance, out = ode.numbers(2, seed), 3 * ode.numbers(2, 50 + seed), torch.empty_like(x)
        for velocity, w in ((both, guidance), (both[:2], None)):
            kernels.launch_euler(x, velocity, step, w, out, 2, config=MILLION)
            differing += int(differing_bits(out, reference.euler(x, velocity, step, w, 2)).sum())
    assert differing == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_values_of_stages(dtype: torch.dtype) -> None:
    """Of the longest row; the slopes at hand have any bits too."""
    from pixelflow_kernels.ode_step import kernels

    differing, n = 0, 1_000_001
    for seed in range(5 if dtype == torch.float32 else 1):
        x, both = ode.hostile(2, n, dtype=dtype, seed=seed), ode.hostile(4, n, dtype=dtype, seed=99 + seed)
        slopes = ode.hostile(6, 2, n, dtype=dtype, seed=50 + seed)
        step, guidance, out = ode.numbers(2, seed), 3 * ode.numbers(2, 50 + seed), torch.empty_like(x)
        kernels.launch_stage(x, slopes, step, DOPRI5.coupling[5], both, guidance, out, 2, config=MILLION)
        differing += int(differing_bits(slopes[4], reference.guided(both, guidance, 2, dtype)).sum())
        differing += int(differing_bits(out, reference.stage_state(x, slopes, step, DOPRI5.coupling[5])).sum())
    assert differing == 0


@packs.draws(20)
@given(data=st.data())
def test_only_accepted_images_move(data: st.DataObject) -> None:
    from pixelflow_kernels.ode_step import kernels

    images, values = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([1, 16, 37]))
    accept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=images, max_size=images)), dtype=torch.bool)
    buffers = [poisoned_like(y, dense=True) for y in (torch.empty(images, values), torch.empty(7, images, values))]
    (_, x), (_, slopes) = buffers
    x.copy_(ode.hostile(images, values))
    slopes.copy_(ode.hostile(7, images, values, seed=1))
    solution = ode.hostile(images, values, seed=2)
    expected = torch.where(accept[:, None], solution, x), slopes.clone()
    expected[1][0] = torch.where(accept[:, None], slopes[6], slopes[0])
    kernels.launch_accept(x, slopes, solution, accept, config=SMALL)
    for (buffer, out), y in zip(buffers, expected, strict=True):
        assert_same_bits(out, y)
        assert_filled(buffer, out)


# --- norms: levels C and D -----------------------------------------------------------------------------------


@packs.draws(25)
@given(data=st.data())
def test_norms(data: st.DataObject) -> None:
    """The error's, and those that the first step needs; slopes are stored on the way, to the bit."""
    from pixelflow_kernels.ode_step import norm_kernels

    dtype, seed = data.draw(packs.interpreted_types()), data.draw(packs.seeds())
    images, width = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 12, 16]))
    rows, std = data.draw(st.sampled_from([1, 2, 3])), data.draw(packs.stds())
    batch_wide, guided, fresh = (data.draw(st.booleans()) for _ in range(3))
    x = ode.normal(images * rows, width, dtype=dtype, seed=seed)
    slopes = ode.normal(7, *x.shape, dtype=dtype, seed=seed + 1, std=std)
    guidance = 3 * ode.numbers(data.draw(st.sampled_from([1, images])), seed) if guided else None
    velocity = halves(ode.normal(2 * x.shape[0], width, dtype=dtype, seed=seed + 2, std=std), guidance)
    slope = reference.guided(velocity, guidance, images, dtype).view(x.shape)
    taken = ode.sliced(velocity, width) if data.draw(st.booleans()) else velocity
    step, tolerance = ode.numbers(images, seed), ode.tolerance()
    rtol, atol = ode.TOLERANCE

    before = slopes.clone()
    if fresh:
        before[6] = slope
    buffer, out = poisoned_like(step, dense=True)
    tableau = (DOPRI5.coupling[6], DOPRI5.error)
    norm_kernels.launch_error(
        x, slopes, step, *tableau, tolerance, taken if fresh else None, guidance if fresh else None, out, batch_wide,
        config=SMALL,
    )  # fmt: skip
    assert_filled(buffer, out)
    assert_same_bits(slopes, before, "slopes")
    plain = reference.error_norm(x, before, step, *tableau, tolerance, batch_wide)
    truth = ode.error64(x, before.double().numpy().reshape(7, images, -1), step.tolist(), batch_wide)
    ode.assert_norms(out, plain, truth, dtype)

    scale = atol + rtol * x.double().abs().view(images, -1).numpy()
    v, first = (y.double().view(images, -1).numpy() for y in (slope, slopes[1]))
    (buffer, out), (slope_buffer, stored) = (poisoned_like(y, dense=True) for y in (step.expand(2, -1), x))
    norm_kernels.launch_start(x, stored, taken, guidance, tolerance, out, False, batch_wide, config=SMALL)
    assert_filled(buffer, out)
    assert_filled(slope_buffer, stored)
    assert_same_bits(stored, slope, "slope")
    plain = reference.start_norms(x, slope, None, tolerance, images, batch_wide)
    for a, b, y in zip(out, plain, (x.double().view(images, -1).numpy(), v), strict=True):
        ode.assert_norms(a, b, ode.rms64(y, scale, batch_wide), dtype)

    (buffer, out), kept = poisoned_like(step[None], dense=True), slopes[1].clone()
    norm_kernels.launch_start(x, slopes[1], taken, guidance, tolerance, out, True, batch_wide, config=SMALL)
    assert_filled(buffer, out)
    assert_same_bits(slopes[1], kept, "slope")
    plain = reference.start_norms(x, slopes[1], slope, tolerance, images, batch_wide)
    ode.assert_norms(out[0], plain[0], ode.rms64(v - first, scale, batch_wide), dtype)


def test_an_image_beside_others_has_the_norm_that_it_has_alone() -> None:
    """Level C: with as many blocks and chunks of partial sums as a large image has; not so batch-wide."""
    from pixelflow_kernels.ode_step import norm_kernels

    x, slopes, step = ode.normal(3, 1001), ode.normal(7, 3, 1001, seed=1), ode.numbers(3)
    tableau = (DOPRI5.coupling[6], DOPRI5.error)

    def norm(images: slice, batch_wide: bool) -> Tensor:
        some, out = slopes[:, images].contiguous(), step[images].clone()
        arguments = (x[images], some, step[images], *tableau, ode.tolerance(), None, None, out, batch_wide)
        norm_kernels.launch_error(*arguments, config={"BLOCK": 256})
        return out

    together = norm(slice(0, 3), False)
    assert_same_bits(torch.cat([norm(slice(b, b + 1), False) for b in range(3)]), together)
    truth = ode.error64(x, slopes.double().numpy(), step.tolist(), True)
    ode.assert_norms(norm(slice(0, 3), True), truth, truth, torch.float32)
    assert len(set(norm(slice(0, 3), True).tolist())) == 1
    assert norm(slice(0, 1), True) != norm(slice(0, 3), True)[:1]


@pytest.mark.parametrize("blocks", [1, 3, 4, 9])
@pytest.mark.parametrize("batch_wide", [False, True])
def test_partial_sums_are_all_added(blocks: int, batch_wide: bool) -> None:
    from pixelflow_kernels.ode_step import norm_kernels

    partial = 2.0 ** torch.arange(2 * 3 * blocks, dtype=F64).view(2, 3, blocks)
    buffer, out = poisoned_like(partial[..., 0], dense=True)
    norm_kernels.launch_finish(partial, 7, out, batch_wide, config={"BLOCK": 4})
    assert_filled(buffer, out)
    expected = (
        partial.sum((1, 2), keepdim=True).expand(2, 3, 1) / 21 if batch_wide else partial.sum(2, keepdim=True) / 7
    )
    torch.testing.assert_close(out, expected[..., 0].sqrt(), rtol=1e-15, atol=0)


def test_the_mean_of_a_batch_of_more_values_than_32_bits_count() -> None:
    from pixelflow_kernels.ode_step import norm_kernels

    out = torch.empty(1, 8, dtype=F64)
    norm_kernels.launch_finish(torch.ones(1, 8, 1, dtype=F64), 2**29, out, True)
    assert_same_bits(out, torch.full_like(out, 2.0**-29).sqrt())


def test_zero_tolerances_at_zero_states_and_nan() -> None:
    """Lanes beyond the image divide 0 by 0 when atol is 0, and must not show; a NaN in the solution must."""
    from pixelflow_kernels.ode_step import norm_kernels

    x, slopes, step = 1 + ode.numbers(2)[:, None].expand(2, 5).float().contiguous(), ode.normal(7, 2, 5), ode.numbers(2)
    relative, tableau = torch.tensor([1e-3, 0.0], dtype=F64), (DOPRI5.coupling[6], DOPRI5.error)
    out = torch.empty(2, dtype=F64)
    norm_kernels.launch_error(x, slopes, step, *tableau, relative, None, None, out, False, config=SMALL)
    plain = reference.error_norm(x, slopes, step, *tableau, relative, False)
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=0)
    norms = torch.empty(2, 2, dtype=F64)
    norm_kernels.launch_start(x, torch.empty_like(x), x, None, relative, norms, False, False, config=SMALL)
    assert norms.isfinite().all()
    x[1, 2] = torch.nan
    norm_kernels.launch_error(x, slopes, step, *tableau, relative, None, None, out, False, config=SMALL)
    assert out.isnan().tolist() == [False, True]
    # Where only the solution is broken, and not the error.
    slopes[0, 0, 3] = torch.nan
    norm_kernels.launch_error(
        x[:1],
        slopes[:2, :1].contiguous(),
        step[:1],
        (1.0,),
        (0.0, 1.0),
        relative,
        None,
        None,
        out[:1],
        False,
        config=SMALL,
    )
    assert out[0].isnan()


# --- the controller --------------------------------------------------------------------------------------------

RATIOS = [0.0, 1e-300, 1e-9, 0.3, 1 - 2.0**-53, 1.0, 1 + 2.0**-52, 1.5, 1e5, 1e300, torch.inf, torch.nan]


@packs.draws(50)
@given(data=st.data())
def test_controller(data: st.DataObject) -> None:
    """Bits of the plain controller, but for the next step, whose root is taken otherwise: 1e-14."""
    from pixelflow_kernels.ode_step import control_kernels

    images = data.draw(st.integers(0, 6))

    def column(of: st.SearchStrategy[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values = torch.tensor(data.draw(st.lists(of, min_size=images, max_size=images)), dtype=dtype)
        buffer, out = poisoned_like(values, dense=True)
        out.copy_(values)
        return buffer, out

    state = [
        column(st.one_of(st.sampled_from([0.0, 1.0, 1 - 2.0**-53, 0.5]), st.floats(0, 1)), F64),
        column(st.one_of(st.sampled_from([1e-20, 0.5, 10.0, torch.inf]), st.floats(1e-6, 1)), F64),
        column(st.sampled_from([RUNNING] * 5 + [ARRIVED, UNDERFLOW, NONFINITE]), torch.int32),
        column(st.integers(0, 5), torch.int64),
        column(st.integers(0, 5), torch.int64),
    ]
    ratio = column(st.one_of(st.sampled_from(RATIOS), st.floats(0, 3)), F64)[1]
    limit, block = data.draw(st.integers(1, 12)), {"BLOCK": 4}
    tau, step, status, accepted, rejected = (y for _, y in state)
    (h_buffer, h), (times_buffer, times) = (poisoned_like(y, dense=True) for y in (tau, tau.expand(7, images)))
    control_kernels.launch_begin(tau, step, status, DOPRI5.nodes, h, times, config=block)
    for buffer, out, expected in zip(
        (h_buffer, times_buffer), (h, times), reference.begin_attempt(tau, step, status, DOPRI5.nodes), strict=True
    ):
        assert_same_bits(out, expected)
        assert_filled(buffer, out)

    expected_state = reference.end_attempt(tau, step, status, accepted, rejected, h, times[-1], ratio, 5, limit)
    accept_bytes = torch.full((images + 64,), 7, dtype=torch.uint8)
    accept_bytes[:images] = 0
    accept = accept_bytes[:images].view(torch.bool)
    factors = (reference.SAFETY, reference.SMALLEST_FACTOR, reference.LARGEST_FACTOR)
    control_kernels.launch_end(
        tau, step, status, accepted, rejected, accept, h, times[-1], ratio, 5, limit, factors, config=block
    )
    for i, ((buffer, out), expected) in enumerate(zip(state, expected_state, strict=False)):
        if i == 1:
            torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
        else:
            assert_same_bits(out, expected)
        assert_filled(buffer, out)
    assert_same_bits(accept_bytes[:images], expected_state[5].to(torch.uint8))
    assert (accept_bytes[images:] == 7).all()


# --- what a CUDA call runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_wide", [False, True])
@pytest.mark.parametrize(("weight", "dtype"), [(None, torch.float32), (2.4, torch.float32), (2.4, F64)])
def test_each_attempt_decides_as_the_engines_solver_does(
    batch_wide: bool, weight: float | None, dtype: torch.dtype
) -> None:
    """From the same state: bits of the new state, slope and time, the same decision; the next step to rounding."""
    x, paces = ode.normal(3, 50, dtype=dtype), (0.5, 4.0, 12.0)
    history: list[solvers.AdaptiveState] = []
    tolerance = solvers.Tolerance(error_norm="batch" if batch_wide else "image")
    field = ode.Field(paces, weight)
    solvers.integrate_adaptive(field.combined, x[..., None, None], DOPRI5, tolerance, history.append)
    state = Adaptive.around(x.clone(), 3, 7)
    start_(state, DOPRI5, field, weight, batch_wide=batch_wide)
    first = solvers._start(field.combined, x[..., None, None], DOPRI5, tolerance)
    close = 1e-3 if dtype == torch.float32 else 1e-10  # errors cancel: their norm is good to about u / rtol
    torch.testing.assert_close(state.step, first.step, rtol=close, atol=0)
    assert_same_bits(state.slopes[0], first.slope[..., 0, 0], "slope")
    for before, after in zip([first, *history[:-1]], history, strict=True):
        for name in ("tau", "step", "accepted", "rejected"):
            getattr(state, name).copy_(getattr(before, name))
        state.x.copy_(before.x[..., 0, 0])
        state.slopes[0].copy_(before.slope[..., 0, 0])
        attempt_(state, DOPRI5, field, weight, batch_wide=batch_wide)
        for name in ("tau", "accepted", "rejected"):
            assert_same_bits(getattr(state, name), getattr(after, name), name)
        assert_same_bits(state.x, after.x[..., 0, 0], "x")
        assert_same_bits(state.slopes[0], after.slope[..., 0, 0], "slope")
        torch.testing.assert_close(state.step, after.step, rtol=close, atol=0)
    assert state.status.tolist() == [ARRIVED] * 3
    assert int(state.rejected.sum()) > 0


def test_an_image_integrates_beside_others_as_it_does_alone() -> None:
    """Level C, whole: bits of state, times and steps."""
    x, paces = ode.normal(3, 40), (0.5, 2.0, 5.0)

    def integrate(images: slice) -> Adaptive:
        state = Adaptive.around(x[images].clone(), len(paces[images]), 7)
        field = ode.Field(paces[images], 2.4)
        start_(state, DOPRI5, field, 2.4)
        while bool((state.status == RUNNING).any()):
            attempt_(state, DOPRI5, field, 2.4)
        return state

    together = integrate(slice(0, 3))
    assert together.status.tolist() == [ARRIVED] * 3
    for b in range(3):
        alone = integrate(slice(b, b + 1))
        for name in ("x", "tau", "step", "accepted", "rejected"):
            assert_same_bits(getattr(alone, name)[0], getattr(together, name)[b], name)


def test_every_implementation_for_cuda_runs() -> None:
    """With the frozen configurations, odd shapes and no images at all."""
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        (operation := name.removeprefix("_launch")): (plain(getattr(module, operation)), getattr(module, name))
        for module in (op, norms, control)
        for name in dir(module)
        if name.startswith("_launch_")
    }
    assert len(implementations) == 9
    for images in (0, 1, 2):
        for plain_or_kernel in (0, 1):
            results = []
            o: dict[str, Any] = {
                "x": ode.normal(images, 5),
                "slopes": ode.normal(7, images, 5, seed=1),
                "velocity": ode.normal(2 * images, 5, seed=2),
                "step": ode.numbers(images),
            }
            w, tol = torch.tensor([2.4], dtype=F64), ode.tolerance()
            rows = [list(DOPRI5.coupling[6]), list(DOPRI5.error)]
            tau, h = 0.5 * ode.numbers(images, 5), ode.numbers(images, 6)
            status, counts = torch.zeros(images, dtype=torch.int32), torch.zeros(2, images, dtype=torch.int64)
            times, accept = torch.zeros(7, images, dtype=F64), torch.zeros(images, dtype=torch.bool)
            out, slope = torch.zeros(images, 5), torch.zeros(images, 5)
            arguments: dict[str, tuple[Any, ...]] = {
                "_euler_step": (o["x"], o["velocity"], o["step"], w, images),
                "_stage_state": (out, o["slopes"], o["x"], o["step"], rows[0][:3], o["velocity"], w, images),
                "_error_norm": (o["slopes"], o["x"], o["step"], *rows, tol, o["velocity"], w, False),
                "_first_slope": (slope, o["x"], o["velocity"], tol, w, images, True),
                "_slope_change": (o["slopes"][0], o["x"], o["velocity"], tol, w, images, False),
                "_begin_attempt": (h, times, tau, o["step"], status, list(DOPRI5.nodes)),
                "_end_attempt": (tau, o["step"], status, *counts, accept, h, times, ode.numbers(images, 7), 5, 9),
                "_take_accepted": (o["x"], o["slopes"], out, accept),
                "_euler_step_in_place": (o["x"], o["velocity"], o["step"], w, images),
            }
            for name, values in arguments.items():
                results.append(implementations[name][plain_or_kernel](*values))
            results += [out, slope, o["slopes"], h, times, tau, o["step"], status, counts, accept, o["x"]]
            if plain_or_kernel == 0:
                expected = results
        for a, b in zip(results, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_nothing_is_launched_for_no_images() -> None:
    from pixelflow_kernels.ode_step import kernels

    buffer, out = poisoned_like(torch.empty(1, 4), dense=True)
    none = torch.empty(0, dtype=F64)
    kernels.launch_euler(out[:0], out[:0], none, None, out[:0], 0)
    kernels.launch_stage(out[:0], out[None, :0], none, (1.0,), None, None, out[:0], 0)
    kernels.launch_accept(out[:0], out[None, :0], out[:0], none.bool())
    assert_untouched(buffer)
