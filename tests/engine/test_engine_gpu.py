"""The fast engine on a device: replays, batches, memory, streams, and its distance from the exact engine."""

from __future__ import annotations

import functools
import gc
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import (
    BackendUnavailableError,
    Checkpoint,
    ModelConfig,
    PixelFlowConfig,
    PixelFlowEngine,
    SchedulerConfig,
    StepEvent,
    backends,
    sampler,
)
from pixelflow_engine.errors import CaptureError
from pixelflow_engine.graphs import CudaCapture
from pixelflow_engine.packed_stages import Glance
from pixelflow_kernels.transfers import Download
from support.engines import tiny_config, tiny_model
from support.kernels import assert_level_d, assert_same_bits
from support.recording import poison, statics
from support.reference_models import normal, seeded

pytestmark = pytest.mark.gpu

CUDA = "cuda"
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 72, "depth": 2, "patch_size": 4, "num_classes": 10}
TEXT = {"num_classes": 0, "cross_attention_dim": 64}
SOLVERS = ["euler", "heun", "ab2", "dopri5"]
COARSE = {"rtol": 0.05, "atol": 0.01, "num_inference_steps": 4}


@pytest.fixture(autouse=True)
def plain_products() -> Iterator[None]:
    """Products of full precision, whatever another test left."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    yield
    matmul.allow_tf32 = before


def gpu_engine(
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "triton",
    *,
    config: PixelFlowConfig | None = None,
    seed: int = 1,
    graphs: bool = False,
    compile: bool = False,
    batch_sizes: tuple[int, ...] | None = None,
    **overrides: Any,
) -> PixelFlowEngine:
    """A small model, 16 -> 32 -> 64 pixels, unless a configuration is given."""
    config = tiny_config(num_stages=3, resolution=64, **(SHAPE | overrides)) if config is None else config
    return PixelFlowEngine.from_checkpoint(
        Checkpoint(config, weights_of(config, seed), "random"),
        CUDA,
        dtype,
        backend,
        graphs=graphs,
        compile=compile,
        batch_sizes=batch_sizes,
    )


def images(engine: PixelFlowEngine, labels: Any = (1, 2, 7), **options: Any) -> Tensor:
    """The state at the end, before it is clamped to what can be shown."""
    *_, end = engine.stream(labels, **(COARSE | options))
    assert isinstance(end.latents, Tensor)
    assert bool(end.latents.isfinite().all())
    return end.latents


@functools.cache
def weights_of(config: PixelFlowConfig, seed: int) -> dict[str, Tensor]:
    """Random weights, rounded to bfloat16 so that they are the same in every type."""
    return tiny_model(config, seed).to(torch.bfloat16).state_dict()


def prompts(lengths: list[int], seed: int, padded_to: int = 24) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {
        "encoder_hidden_states": normal((len(lengths), padded_to, 64), generator, torch.float32),
        "encoder_attention_mask": (torch.arange(padded_to) < torch.tensor(lengths)[:, None]).float(),
        "null_encoder_hidden_states": normal((1, padded_to, 64), generator, torch.float32),
        "null_encoder_attention_mask": (torch.arange(padded_to) < 1).float()[None],
    }


# --- replays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1.0, 2.4])
def test_a_replay_has_the_bits_of_the_launches(dtype: torch.dtype, solver: str, scale: float) -> None:
    """In the call that captures, and in later ones with other labels, seeds and weights."""
    replayed, launched = gpu_engine(dtype, graphs=True), gpu_engine(dtype)
    for call in (0, 1, 2):
        options = {"solver": solver, "seed": call, "guidance_scale": 1.0 if scale == 1.0 else scale + call}
        labels = (1 + call, 2, 7)
        assert_same_bits(images(replayed, labels, **options), images(launched, labels, **options), f"call {call}")
    replayed.close()


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_so_for_prompts(solver: str) -> None:
    replayed, launched = gpu_engine(graphs=True, **TEXT), gpu_engine(**TEXT)
    for seed, lengths in enumerate([[3, 24, 9], [9, 3, 24], [12, 12, 12], [1, 2, 3]]):
        call = prompts(lengths, seed)
        assert_same_bits(
            images(replayed, None, solver=solver, **call), images(launched, None, solver=solver, **call), str(lengths)
        )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("text", [False, True])
def test_nothing_is_left_over_from_before(solver: str, text: bool) -> None:
    """All static tensors are poison before the call."""
    engine = gpu_engine(graphs=True, **(TEXT if text else {}))
    call = {"labels": None} | prompts([3, 24, 9], 1) if text else {}
    expected = images(engine, solver=solver, **call)
    found = list(statics(engine._programs))
    assert len(found) > 10
    for x in found:
        poison(x)
    assert_same_bits(images(engine, solver=solver, **call), expected)


def test_two_engines_side_by_side() -> None:
    engines = [gpu_engine(graphs=True, seed=seed) for seed in (1, 2)]
    expected = [images(gpu_engine(seed=seed)) for seed in (1, 2)]
    assert not torch.equal(*expected)
    for _ in range(2):
        streams = [engine.stream((1, 2, 7), **COARSE) for engine in engines]
        for _ in range(3):
            ends = [next(stream) for stream in streams]
        for end, image in zip(ends, expected, strict=True):
            assert_same_bits(end.latents, image)


@pytest.mark.parametrize("solver", ["ab2", "dopri5"])
def test_compiled_blocks_are_replayed_too(solver: str) -> None:
    """Compiled and captured has the bits of compiled and launched, and is near the plain kernels."""
    both, compiled = gpu_engine(graphs=True, compile=True), gpu_engine(compile=True)
    for call in (0, 1):
        options = {"solver": solver, "seed": call}
        found, launched = images(both, **options), images(compiled, **options)
        assert_same_bits(found, launched, f"call {call}")
    if solver != "dopri5":  # whose decisions may part by a rounding
        exact = gpu_engine(torch.float64, "torch")
        truth = images(exact, **options).float()
        plain = (images(gpu_engine(), **options) - truth).abs().max()
        assert float((found - truth).abs().max()) <= 2 * float(plain) + 1e-3


def test_two_threads_on_two_streams() -> None:
    """One engine, its static tensors and its pool of memory; each has the bits that it has alone."""
    engine = gpu_engine(graphs=True)
    calls = [{"labels": (1 + i, 2, 7), "seed": i, "solver": solver} for i, solver in enumerate(["euler", "heun"])]
    alone = [images(gpu_engine(), **call) for call in calls]
    for call in calls:
        images(engine, **call)  # captured; from here on the host runs ahead of the device
    found: list[list[Tensor]] = [[], []]
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                found[i].extend(images(engine, **calls[i]) for _ in range(20))
            stream.synchronize()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for several, expected in zip(found, alone, strict=True):
        assert len(several) == 20
        for image in several:
            assert_same_bits(image, expected)


def test_close_and_begin_again() -> None:
    engine = gpu_engine(graphs=True)
    expected = images(engine)
    for _ in range(3):
        engine.close()
        assert_same_bits(images(engine), expected)


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the first error, not that the capture was ended by it; the next call captures anew.

    Beside graphs that stay, and the caller's stream is the current one again.
    """
    engine, stream = gpu_engine(graphs=True), torch.cuda.current_stream()
    alone = images(engine, (5,))
    programs, trunk = [*engine._programs.programs], engine.model.trunk

    def reads(*arguments: Any) -> Tensor:
        out = trunk(*arguments)
        float(out.sum())
        return out

    monkeypatch.setattr(engine.model, "trunk", reads)
    with pytest.raises(CaptureError, match=r"^graphs: a step could not be captured: .*captur"):
        images(engine)
    assert [*engine._programs.programs] == programs
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    assert_same_bits(images(engine), images(gpu_engine()))
    assert_same_bits(images(engine, (5,)), alone)


def test_a_capture_leaves_nothing_when_its_graph_is_dropped() -> None:
    capture, x = CudaCapture(torch.device(CUDA, torch.cuda.current_device())), torch.zeros(4, device=CUDA)
    for _ in range(3):
        replay = capture.capture(lambda: x.add_(1.0))
        x.zero_()
        replay()
        assert x.tolist() == [1.0] * 4
        assert len(capture.graphs) == 1
        del replay
        assert len(capture.graphs) == 0


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_captured_in_a_stream_of_the_callers(solver: str) -> None:
    """Captured and replayed there, then replayed in the default stream; nobody's random state changes."""
    engine, expected = gpu_engine(graphs=True), images(gpu_engine(), solver=solver)
    torch.cuda.manual_seed(3)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [images(engine, solver=solver) for _ in range(2)]
        assert torch.cuda.current_stream() == stream
    torch.cuda.current_stream().wait_stream(stream)
    found.append(images(engine, solver=solver))
    for image in found:
        assert_same_bits(image, expected)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())
    torch.rand(1, device=CUDA)  # not in the state of a capture any more


# --- memory and waiting ------------------------------------------------------------------------------------


def test_a_thousand_replays_keep_nothing() -> None:
    engine = gpu_engine(graphs=True)
    steps = [300, 300, 400]
    for _ in range(2):
        images(engine, num_inference_steps=steps)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    images(engine, num_inference_steps=steps)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
@pytest.mark.parametrize("labels", [(1, 2, 7), (3,)])
def test_no_step_waits_for_the_device(graphs: bool, solver: str, labels: tuple[int, ...]) -> None:
    """From the end of a stage's first step to that of its last one, the error mode of synchronization is on."""
    engine, steps, seen = gpu_engine(graphs=graphs), 4, []
    images(engine, labels, solver=solver, num_inference_steps=steps)

    def watch(event: StepEvent) -> None:
        seen.append(event.step)
        torch.cuda.set_sync_debug_mode("default" if event.step == steps - 1 else "error")

    try:
        images(engine, labels, solver=solver, num_inference_steps=steps, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [*range(steps)] * 3


def test_the_watch_sees_what_waits() -> None:
    """The negative control: the mode does notice a callback that reads the state."""
    engine = gpu_engine(graphs=True)

    def reads(event: StepEvent) -> None:
        torch.cuda.set_sync_debug_mode("error")
        float(event.latents[0].sum())  # type: ignore[union-attr]

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            images(engine, callback_on_step_end=reads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_no_call_waits_before_its_end(graphs: bool, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error mode is on from before the call until its statuses are read, once for all stages."""
    engine, reads = gpu_engine(graphs=graphs), []
    options = {"solver": solver, "num_inference_steps": 3, "output_type": "pt", "seed": 1}
    expected = engine([1, 2, 7], **options)
    original = sampler._raise_for

    def read(passed: Any, order: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(passed))
        original(passed, order)

    monkeypatch.setattr(sampler, "_raise_for", read)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = engine([1, 2, 7], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [3]
    assert all(stage.seconds > 0 for stage in found.stages)
    assert_same_bits(found.images, expected.images)


@pytest.mark.parametrize("graphs", [False, True])
def test_dopri5_waits_where_it_says_so(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts the host waits for events alone, and seldom for the attempt that is running."""
    engine, fine = gpu_engine(torch.float32, graphs=graphs), {"solver": "dopri5", "rtol": 1e-5, "atol": 1e-6}
    expected = images(engine, **fine)
    take, runs, wait = Glance.take, Glance.anybody_runs, Download.wait
    taken: list[Download] = []
    asked: list[bool] = []

    def took(self: Glance) -> None:
        take(self)
        taken.append(self._seen[-1])

    def watched(self: Glance) -> bool:
        more = runs(self)
        torch.cuda.set_sync_debug_mode("error" if more else "default")
        return more

    def waited(self: Download) -> Tensor:
        asked.append(self is taken[-1])
        return wait(self)

    monkeypatch.setattr(Glance, "take", took)
    monkeypatch.setattr(Glance, "anybody_runs", watched)
    monkeypatch.setattr(Download, "wait", waited)
    try:
        *_, end = engine.stream((1, 2, 7), **(COARSE | fine))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(end.latents, expected)
    assert end.report.steps > 6, "too few attempts to tell"
    assert sum(asked) < len(asked) / 2, "the attempt that runs was waited for most of the time"


def told(engine: PixelFlowEngine, count: int) -> str:
    """What is said of so many images; what their call still held is given up on return."""
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        images(engine, [1] * count)
    return str(caught.value)


def test_too_many_images_are_told_how_many_would_fit() -> None:
    """Of what this process may have, which is far less than the device has; and so many do fit.

    At the peak, by the estimate, an image has eight rows of 288 values of two bytes for each of its 2 * 256 tokens. It
    is a lower bound, at least 0.7 of what is counted (see test_memory), so seven of ten of those told are run.
    """
    engine, room, each = gpu_engine(), 2**29, 8 * 288 * 2 * 2 * 256
    expected = images(engine, range(4))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allowed, total = torch.cuda.memory_reserved() + room, torch.cuda.get_device_properties(CUDA).total_memory
    unused = allowed - torch.cuda.memory_allocated()
    try:
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        text = told(engine, 4096)
        found = re.match(r"out of memory: 4096 images at once, about (\d+) MiB each; about (\d+) would fit", text)
        assert found is not None, text
        fit = int(found[2])
        assert unused // (2 * each) <= fit <= unused // each < 4096 // 8, text
        assert f"batch_sizes=[{fit}]" in text
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert len(images(engine, [1] * (fit * 7 // 10))) == fit * 7 // 10
        assert torch.cuda.max_memory_reserved() <= allowed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_bits(images(engine, range(4)), expected)


# --- batches -----------------------------------------------------------------------------------------------


def test_two_hundred_images_alone_and_in_batches() -> None:
    """All batches have the shape of 16 images, so the place and the mates of an image are all that changes."""
    engine = gpu_engine(graphs=True, batch_sizes=(16,))
    generator = seeded(7)
    labels = torch.randint(0, 11, (200,), generator=generator).tolist()
    seeds = torch.randperm(10_000, generator=generator)[:200].tolist()
    few = {"num_inference_steps": 2}
    alone = torch.cat([images(engine, [c], seed=[s], **few) for c, s in zip(labels, seeds, strict=True)])
    first = 0
    while first < 200:
        last = min(200, first + int(torch.randint(2, 17, (), generator=generator)))
        found = images(engine, labels[first:last], seed=seeds[first:last], **few)
        assert_same_bits(found, alone[first:last], f"images {first} to {last - 1}")
        first = last
    assert len(engine._programs.programs) == 3


def test_dopri5_alone_and_in_batches() -> None:
    engine = gpu_engine(graphs=True, batch_sizes=(8,))
    alone = torch.cat([images(engine, [c], seed=[c], solver="dopri5") for c in range(8)])
    for batch in (2, 5, 8):
        assert_same_bits(images(engine, range(batch), seed=[*range(batch)], solver="dopri5"), alone[:batch])


def test_without_sizes_the_others_do_matter() -> None:
    """The negative control: in float32 a product of 16 times the rows is divided otherwise."""
    engine = gpu_engine(torch.float32)
    together = images(engine, range(10), seed=0)
    alone = torch.cat([images(engine, [c], seed=c) for c in range(10)])
    assert torch.allclose(together, alone, atol=1e-2)
    assert not torch.equal(together, alone)


# --- against the exact engine ------------------------------------------------------------------------------

XL = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=16, attention_head_dim=72, depth=2, patch_size=4, num_classes=1000),
    scheduler=SchedulerConfig(num_stages=4),
    resolution=256,
)


@pytest.mark.parametrize("pixels", [32, 64, 128, 256])
def test_velocities_of_a_wide_model_are_level_d(pixels: int) -> None:
    """Two blocks of the XL model at the size of each stage; truth is the exact engine in float64."""
    x = normal((2, 3, pixels, pixels), seeded(pixels), torch.float32).to(torch.bfloat16).to(CUDA)

    def velocity(dtype: torch.dtype, backend: str) -> Tensor:
        engine = gpu_engine(dtype, backend, config=XL)
        with torch.no_grad():
            return engine.velocity(x.to(dtype), torch.tensor([37.0, 700.0]), class_labels=[3, 1000])

    truth = velocity(torch.float64, "torch")
    plain = velocity(torch.bfloat16, "torch")
    assert_level_d(velocity(torch.bfloat16, "triton"), plain, truth, scale=float(truth.abs().max()))
    assert_level_d(
        velocity(torch.float32, "triton"), velocity(torch.float32, "torch"), truth, scale=float(truth.abs().max())
    )


@pytest.mark.parametrize("pixels", [64, 128])
def test_gradients_of_the_velocity_are_level_d(pixels: int) -> None:
    """With respect to the images, as inverse problems want them; truth is the exact engine in float64."""
    g = seeded(pixels)
    x, cotangent = (normal((2, 3, pixels, pixels), g, torch.float32).to(torch.bfloat16).to(CUDA) for _ in range(2))

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        engine, y = gpu_engine(dtype, backend, config=XL), x.to(dtype).requires_grad_()
        v = engine.velocity(y, torch.tensor([37.0, 700.0]), class_labels=[3, 1000])
        (found,) = torch.autograd.grad(v, y, cotangent.to(dtype))
        return found

    truth = gradient(torch.float64, "torch")
    assert bool(truth.any())
    for dtype in (torch.bfloat16, torch.float32):
        plain = gradient(dtype, "torch")
        assert_level_d(gradient(dtype, "triton"), plain, truth, scale=float(truth.abs().max()))


@pytest.fixture
def flash() -> None:
    """FlashAttention, or none of what needs it."""
    try:
        backends.choose("flash", torch.device(CUDA), torch.bfloat16, 72)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("pixels", [32, 64, 128])
def test_velocities_by_flash_attention_are_level_d(pixels: int) -> None:
    x = normal((2, 3, pixels, pixels), seeded(pixels), torch.float32).to(torch.bfloat16).to(CUDA)

    def velocity(dtype: torch.dtype, backend: str) -> Tensor:
        engine = gpu_engine(dtype, backend, config=XL)
        with torch.no_grad():
            return engine.velocity(x.to(dtype), torch.tensor([37.0, 700.0]), class_labels=[3, 1000])

    truth = velocity(torch.float64, "torch")
    plain = velocity(torch.bfloat16, "torch")
    assert_level_d(velocity(torch.bfloat16, "flash"), plain, truth, scale=float(truth.abs().max()))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_flash_attention_is_replayed(solver: str) -> None:
    replayed, launched = gpu_engine(backend="flash", graphs=True), gpu_engine(backend="flash")
    for seed in (0, 1):
        options = {"solver": solver, "seed": seed}
        assert_same_bits(images(replayed, **options), images(launched, **options), f"call {seed}")


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_fixed_steps_are_those_of_the_exact_engine(solver: str) -> None:
    """In float32; after twelve steps no further from float64 than a few times the exact engine."""
    _compare(lambda engine: images(engine, solver=solver))


def test_dopri5_on_the_device_is_dopri5() -> None:
    """At a tolerance at which both are close to the solution of the equation, as float64 has it at a finer one."""
    exact = gpu_engine(torch.float64, "torch")
    truth = images(exact, solver="dopri5", rtol=1e-6, atol=1e-6)
    fine = {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    plain = (images(gpu_engine(torch.float32, "torch"), **fine) - truth).abs().max()
    ours = (images(gpu_engine(torch.float32, graphs=True), **fine) - truth).abs().max()
    assert float(ours) <= 2 * float(plain) + 1e-5, f"{float(ours):.2e}, the exact engine {float(plain):.2e}"


def _compare(sample: Callable[[PixelFlowEngine], Tensor]) -> None:
    truth = sample(gpu_engine(torch.float64, "torch")).double()
    plain = (sample(gpu_engine(torch.float32, "torch")) - truth).abs().max()
    ours = (sample(gpu_engine(torch.float32, graphs=True)) - truth).abs().max()
    assert float(ours) <= 4 * float(plain) + 1e-6, f"{float(ours):.2e}, the exact engine {float(plain):.2e}"
