"""Steps replayed from graphs are the steps launched one by one, bit for bit, whatever was replayed before.

On a CPU a recording stands in for the graph (``support.recording``). An engine that has made other calls before is held
against a fresh one: whatever a graph froze by mistake shows there.
"""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request, packed_stages
from pixelflow_engine.errors import CaptureError
from pixelflow_engine.graphs import load_
from support.engines import tiny_config, tiny_model
from support.kernels import assert_same_bits
from support.recording import RecordingCapture, RefusedError, packed_engine, poison, statics
from support.reference_models import normal, seeded

SOLVERS = ["euler", "heun", "ab2", "dopri5"]
TEXT = {"num_classes": 0, "cross_attention_dim": 12}


def images(engine: PixelFlowEngine, labels: Any = (1, 2), **options: Any) -> Tensor:
    """The state at the end, before it is clamped to what can be shown."""
    coarse = {"num_inference_steps": 3, "rtol": 0.2, "atol": 0.05}  # Dopri5 has some four attempts a stage
    *_, end = engine.stream(labels, **(coarse | options))
    assert isinstance(end.latents, Tensor)
    return end.latents


def prompts(lengths: list[int], seed: int, padded_to: int = 5) -> dict[str, Tensor]:
    """Random prompts of these lengths and an empty prompt of two tokens."""
    generator = seeded(seed)
    mask = (torch.arange(padded_to) < torch.tensor(lengths)[:, None]).float()
    null = (torch.arange(padded_to) < 2).float()[None]
    return {
        "encoder_hidden_states": normal((len(lengths), padded_to, 12), generator, torch.float32),
        "encoder_attention_mask": mask,
        "null_encoder_hidden_states": normal((1, padded_to, 12), generator, torch.float32),
        "null_encoder_attention_mask": null,
    }


# --- the stand-in itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launch",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: x.add_(torch.tensor([1.0])),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.to("meta"),
        lambda x: x.cpu(),
    ],
)
def test_what_a_capture_refuses(launch: Callable[[Tensor], object]) -> None:
    x = torch.ones(3)
    with pytest.raises(CaptureError, match=r"^graphs: a step could not be captured: .+"):
        RecordingCapture().capture(lambda: launch(x))


def test_a_replay_runs_operations_and_no_python() -> None:
    x, y, ran = torch.ones(3), torch.zeros(3), []

    def launch() -> None:
        ran.append(1)
        y.copy_(torch.ones_like(x) + x * len(ran))  # a number that changes is frozen

    replay = RecordingCapture().capture(launch)
    assert bool(y.isnan().all()), "what a capture writes is not loaded yet"
    for value in (1.0, 5.0):
        x.fill_(value)
        replay()
        assert y.tolist() == [1 + 3 * value] * 3
    assert len(ran) == 3


def test_a_graph_does_not_keep_what_it_reads() -> None:
    class Owner:
        x: Tensor = torch.ones(3)

    owner, y = Owner(), torch.zeros(3)
    owner.x = torch.ones(3)
    replay = RecordingCapture().capture(lambda: y.copy_(2 * owner.x[1:].sum()))
    owner.x.fill_(4.0)
    replay()
    assert y.tolist() == [16.0] * 3
    owner.x = torch.ones(3)
    with pytest.raises(RefusedError, match="given up"):
        replay()


def test_a_graph_wants_what_it_reads_where_it_was() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    replay = RecordingCapture().capture(lambda: y.copy_(x))
    x.untyped_storage().resize_(400_000)
    with pytest.raises(RefusedError, match="moved"):
        replay()


def test_what_a_launch_allocates_is_gone_afterwards() -> None:
    x, kept = torch.ones(3), []
    replay = RecordingCapture().capture(lambda: kept.append(x + 1))
    assert bool(kept[-1].isnan().all())
    replay()
    assert bool(kept[-1].isnan().all())


def test_a_closed_graph_is_not_replayed() -> None:
    x, capture = torch.ones(3), RecordingCapture()
    replay = capture.capture(lambda: x.add_(1.0))
    replay()
    capture.close()
    with pytest.raises(RefusedError, match="closed"):
        replay()


# --- replays equal launches --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1.0, 2.4])
def test_a_replay_has_the_bits_of_the_launches(solver: str, scale: float) -> None:
    capture = RecordingCapture()
    options = {"solver": solver, "guidance_scale": scale}
    expected = images(packed_engine(), **options)
    assert_same_bits(images(packed_engine(capture), **options), expected)
    assert capture.replayed > 0


@pytest.mark.parametrize("solver", ["ab2", "dopri5"])
@pytest.mark.parametrize("plain", [False, True])
def test_so_for_prompts(solver: str, plain: bool) -> None:
    options = {"solver": solver, "labels": None} | prompts([3, 5], seed=3)
    expected = images(packed_engine(plain=plain, **TEXT), **options)
    assert_same_bits(images(packed_engine(RecordingCapture(), plain=plain, **TEXT), **options), expected)


def test_so_for_requests_of_several_sizes_and_weights() -> None:
    requests = [
        Request(class_label=1, seed=1, guidance_scale=1.0, height=16, width=32),
        Request(class_label=2, seed=2, guidance_scale=3.0),
        Request(class_label=3, seed=3, guidance_scale=2.0),
    ]
    others = [
        Request(class_label=4, seed=8, guidance_scale=1.0, height=16, width=32),
        Request(class_label=0, seed=9, guidance_scale=1.5),
        Request(class_label=5, seed=7, guidance_scale=4.0),
    ]
    engine, capture = packed_engine(capture := RecordingCapture()), capture
    engine(others, output_type="pt", num_inference_steps=2)
    captured = capture.captured
    found = engine(requests, output_type="pt", num_inference_steps=2).images
    expected = packed_engine()(requests, output_type="pt", num_inference_steps=2).images
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_bits(mine, theirs)
    assert capture.captured == captured


# --- a call after other calls ------------------------------------------------------------------------------

FIRST = {"labels": (1, 2), "seed": 5, "guidance_scale": 2.4, "num_inference_steps": 3}
CHANGES: list[dict[str, Any]] = [
    {"labels": (4, 5)},
    {"seed": [7, 2**64 - 1]},
    {"guidance_scale": 5.0},
    {"guidance_schedule": [2.0, 1.5, 3.0]},
    {"num_inference_steps": [2, 4, 3]},
    {"shift": 2.0},
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_programs_serve_other_calls(solver: str, change: dict[str, Any]) -> None:
    if solver == "dopri5":  # it has neither steps nor shift
        change = {"shift": {"rtol": 0.1}, "num_inference_steps": {"atol": 0.1}}.get(next(iter(change)), change)
    engine = packed_engine(capture := RecordingCapture())
    images(engine, solver=solver, **FIRST)
    captured = capture.captured
    call = FIRST | change | {"solver": solver}
    found = images(engine, **call)
    assert_same_bits(found, images(packed_engine(), **call))
    assert not torch.equal(found, images(packed_engine(), solver=solver, **FIRST)), "the change changes nothing"
    # The first stage is guided only where the schedule says so; all other programs are there already.
    assert capture.captured == captured + ("guidance_schedule" in change) * (captured // 3)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("lengths", [[3, 5], [5, 3], [4, 4]])
def test_programs_serve_other_prompts(solver: str, plain: bool, lengths: list[int]) -> None:
    """Prompts of one shape, whose tokens, masks and lengths differ."""
    engine = packed_engine(capture := RecordingCapture(), plain=plain, **TEXT)
    images(engine, None, solver=solver, **prompts([3, 5], seed=1))
    captured = capture.captured
    call = prompts(lengths, seed=2)
    found = images(engine, None, solver=solver, **call)
    assert_same_bits(found, images(packed_engine(plain=plain, **TEXT), None, solver=solver, **call))
    assert capture.captured == captured


@pytest.mark.parametrize("plain", [False, True])
def test_prompts_without_a_mask_after_prompts_with_one(plain: bool) -> None:
    engine = packed_engine(RecordingCapture(), plain=plain, **TEXT)
    masked = prompts([3, 5], seed=1)
    unmasked = {name: value for name, value in masked.items() if "mask" not in name}
    for call in (masked, unmasked, masked):
        expected = images(packed_engine(plain=plain, **TEXT), None, **call)
        assert_same_bits(images(engine, None, **call), expected)


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        ({"labels": (1, 2, 3)}, 3),
        ({"height": 32}, 3),
        ({"solver": "dopri5"}, 3),
        ({"guidance_scale": 1.0}, 2),  # the first stage has no null half anyway
        ({"solver": "heun"}, 0),  # other graphs over the same tensors
    ],
)
def test_other_shapes_and_solvers_have_their_own(change: dict[str, Any], programs: int) -> None:
    engine = packed_engine(capture := RecordingCapture())
    images(engine, **FIRST)
    before, captured = len(engine._programs.programs), capture.captured
    images(engine, **(FIRST | change))
    assert len(engine._programs.programs) == before + programs
    assert capture.captured > captured
    assert_same_bits(images(engine, **FIRST), images(packed_engine(), **FIRST))


def test_the_program_used_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_stages, "MOST_PROGRAMS", 4)
    engine = packed_engine(capture := RecordingCapture())  # three stages
    one, two = {"labels": (1,)}, {"labels": (1, 2)}
    first = images(engine, **FIRST | one)
    images(engine, **FIRST | two)
    assert len(engine._programs.programs) == 4
    captured = capture.captured
    images(engine, **FIRST | two)
    assert capture.captured == captured, "those used last are kept"
    assert_same_bits(images(engine, **FIRST | one), first)
    assert capture.captured > captured
    assert len(engine._programs.programs) == 4


def test_prompts_that_no_program_reads_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server sees prompts of many lengths; each kind has tensors of its own."""
    monkeypatch.setattr(packed_stages, "MOST_PROGRAMS", 4)
    engine = packed_engine(RecordingCapture(), **TEXT)
    first = None
    for padded_to in (5, 6, 7, 5):
        call = prompts([3, 5], seed=1, padded_to=padded_to)
        found = images(engine, None, **call)
        assert_same_bits(found, images(packed_engine(**TEXT), None, **call))
        kept = {id(program.around.prompts) for program in engine._programs.programs.values()}
        assert {id(static) for static in engine._programs.prompts.values()} == kept
        assert len(kept) <= 4
        first = found if first is None else first
    assert_same_bits(found, first)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_a_size_of_one_stage_may_be_anothers(solver: str) -> None:
    """At twice the size the second stage has the third one's shape, and other times."""
    engine = packed_engine(RecordingCapture())
    for size in (16, 32):
        call = FIRST | {"solver": solver, "height": size, "width": size}
        assert_same_bits(images(engine, **call), images(packed_engine(), **call))


def test_one_weight_for_all_or_one_for_each() -> None:
    engine = packed_engine(RecordingCapture())
    for scales in ((2.0, 2.0), (2.0, 3.0), (4.0, 1.5), (3.0, 3.0)):
        requests = [Request(class_label=i, seed=i, guidance_scale=scale) for i, scale in enumerate(scales)]
        assert_same_bits(images(engine, requests), images(packed_engine(), requests))


def test_dopri5s_kinds_of_norm_have_their_own() -> None:
    engine = packed_engine(RecordingCapture())
    for norm in ("image", "batch", "image"):
        call = FIRST | {"solver": "dopri5", "error_norm": norm}
        assert_same_bits(images(engine, **call), images(packed_engine(), **call))


def test_steps_from_the_middle_of_a_stage() -> None:
    """ab2's first step is Heun's, wherever it begins."""
    engine, given = packed_engine(RecordingCapture()), torch.rand(2, 3, 16, 16, generator=seeded(4))
    images(engine, solver="ab2", **FIRST)
    call = FIRST | {"solver": "ab2", "image": given, "start_stage": 1, "strength": 0.7, "num_inference_steps": 5}
    found = images(engine, **call)
    assert_same_bits(found, images(packed_engine(), **call))
    exact = PixelFlowEngine(config := tiny_config(), tiny_model(config), "torch")
    assert torch.allclose(found, images(exact, **call), atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("text", [False, True])
def test_nothing_is_left_over_from_before(solver: str, text: bool) -> None:
    """All static tensors are poison before the call."""
    shape = TEXT if text else {}
    call = FIRST | {"solver": solver} | ({"labels": None} | prompts([3, 5], seed=1) if text else {})
    engine = packed_engine(RecordingCapture(), **shape)
    expected = images(engine, **call)
    found = list(statics(engine._programs))
    assert len(found) > 10
    for x in found:
        poison(x)
    assert_same_bits(images(engine, **call), expected)


def test_two_engines_side_by_side() -> None:
    engines = [packed_engine(RecordingCapture(), seed=seed) for seed in (1, 2)]
    fresh = [images(packed_engine(seed=seed), **FIRST) for seed in (1, 2)]
    assert not torch.equal(*fresh)
    streams = [engine.stream(FIRST["labels"], seed=5, guidance_scale=2.4, num_inference_steps=3) for engine in engines]
    for _ in range(3):
        ends = [next(stream) for stream in streams]
    for end, expected in zip(ends, fresh, strict=True):
        assert_same_bits(end.latents, expected)


def test_two_calls_of_one_engine_stage_by_stage() -> None:
    """The prompts of the one must not be seen by the other."""
    engine = packed_engine(RecordingCapture(), **TEXT)
    calls = [prompts([3, 5], seed=seed) for seed in (1, 2)]
    expected = [images(packed_engine(**TEXT), None, **call) for call in calls]
    for _ in range(2):
        streams = [engine.stream(num_inference_steps=3, **call) for call in calls]
        for _ in range(3):
            ends = [next(stream) for stream in streams]
        for end, images_alone in zip(ends, expected, strict=True):
            assert_same_bits(end.latents, images_alone)


def test_a_callback_may_call_the_engine() -> None:
    engine = packed_engine(RecordingCapture(), **TEXT)
    outer, inner = prompts([3, 5], seed=1), prompts([5, 3], seed=2)
    expected = [images(packed_engine(**TEXT), None, **call) for call in (outer, inner)]
    found = []
    result = images(engine, None, callback_on_step_end=lambda _: found.append(images(engine, None, **inner)), **outer)
    assert_same_bits(result, expected[0])
    assert len(found) == 9
    for image in found:
        assert_same_bits(image, expected[1])


def test_a_callback_may_not_close_the_engine() -> None:
    engine = packed_engine(RecordingCapture())
    with pytest.raises(RuntimeError, match="close: got a call from a callback"):
        images(engine, callback_on_step_end=lambda _: engine.close(), **FIRST)
    assert_same_bits(images(engine, **FIRST), images(packed_engine(), **FIRST))


def test_new_latents_from_a_callback() -> None:
    call = FIRST | {"callback_on_step_end": lambda event: event.latents * 0.5 if event.step == 1 else None}
    assert_same_bits(images(packed_engine(RecordingCapture()), **call), images(packed_engine(), **call))


# --- memory, errors, threads -------------------------------------------------------------------------------


def test_a_thousand_replays_keep_nothing() -> None:
    engine = packed_engine(capture := RecordingCapture(), num_stages=1, resolution=4)

    def call(steps: int) -> None:
        images(engine, (1,), num_inference_steps=steps)

    call(10)
    gc.collect()
    tracemalloc.start()
    try:
        call(10)
        gc.collect()
        tensors, held = _tensors(), tracemalloc.get_traced_memory()[0]
        before = capture.replayed
        call(1000)
        gc.collect()
        assert capture.replayed - before == 1000
        assert _tensors() == tensors
        assert tracemalloc.get_traced_memory()[0] - held < 100_000
    finally:
        tracemalloc.stop()


def _tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())  # isinstance asks the object


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_without_graphs_a_calls_memory_goes_with_it(solver: str) -> None:
    """Not when the collector of cycles comes round, which knows nothing of a device's memory."""
    engine = packed_engine()
    images(engine, solver=solver)
    gc.collect()
    gc.disable()
    try:
        before = _tensors()
        images(engine, solver=solver)
        assert _tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("text", [False, True])
def test_close_and_begin_again(text: bool) -> None:
    engine = packed_engine(capture := RecordingCapture(), **(TEXT if text else {}))
    call = {"labels": None} | prompts([3, 5], seed=1) if text else FIRST
    expected = images(engine, **call)
    captured = capture.captured
    images(engine, **call)
    assert capture.captured == captured
    engine.close()
    assert not list(statics(engine._programs))
    assert not capture.graphs
    assert_same_bits(images(engine, **call), expected)
    assert capture.captured == 2 * captured


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
@pytest.mark.parametrize("solver", ["euler", "ab2", "dopri5"])
def test_a_capture_that_fails(solver: str, fail_at: int) -> None:
    engine = packed_engine(capture := RecordingCapture(fail_at))
    per_program = 1 if solver == "euler" else 2
    if solver == "euler" and fail_at == 3:
        capture.fail_at = 1
    with pytest.raises(CaptureError, match=r"^graphs: a step could not be captured: failed on purpose$"):
        images(engine, **FIRST, solver=solver)
    done = capture.captured - 1
    assert len(engine._programs.programs) == done // per_program
    assert_same_bits(images(engine, **FIRST, solver=solver), images(packed_engine(), **FIRST, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_error_in_the_middle_of_a_call(solver: str) -> None:
    engine = packed_engine(RecordingCapture())

    def stop(event: Any) -> None:
        if event.stage == 1 and event.step == 1:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        images(engine, **FIRST, solver=solver, callback_on_step_end=stop)
    other = FIRST | {"labels": (3, 4), "solver": solver}
    assert_same_bits(images(engine, **other), images(packed_engine(), **other))


def test_threads_take_turns() -> None:
    engine = packed_engine(RecordingCapture())
    calls = [FIRST | {"labels": (i, i), "seed": i, "solver": solver} for i in (1, 4) for solver in ("heun", "dopri5")]
    expected = [images(packed_engine(), **call) for call in calls]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(calls))}

    def work(i: int) -> None:
        for _ in range(3):
            found[i].append(images(engine, **calls[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, reference in enumerate(expected):
        assert len(found[i]) == 3
        for image in found[i]:
            assert_same_bits(image, reference)


def test_what_load_refuses() -> None:
    buffer = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^x: got shape \(3,\), expected \(2, 3\) as captured$"):
        load_(buffer, torch.ones(3), "x")
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected torch.float32 as captured$"):
        load_(buffer, torch.ones(2, 3, dtype=torch.float64), "x")
    with pytest.raises(ValueError, match=r"^x: got device meta, expected cpu as captured$"):
        load_(buffer, torch.ones(2, 3, device="meta"), "x")
    address = buffer.data_ptr()
    load_(buffer, torch.ones(2, 3), "x")
    assert buffer.data_ptr() == address
    assert bool((buffer == 1).all())
