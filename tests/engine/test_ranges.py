"""Ranges as profilers see them: which, inside which, and none where nobody asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pixelflow_engine import PixelFlowEngine, ranges
from pixelflow_engine.ranges import named, ranges_shown
from support.engines import tiny_engine
from support.recording import RecordingCapture, packed_engine

SHAPE: dict[str, Any] = {"num_stages": 2, "resolution": 8, "depth": 2}
ENGINES: list[Callable[..., PixelFlowEngine]] = [tiny_engine, packed_engine]
both_ways = pytest.mark.parametrize("make", ENGINES, ids=["plain", "packed"])

BLOCKS = ["block 0", "block 1"]


def seen(work: Callable[[], object], shown: Callable[[], AbstractContextManager[object]] = ranges_shown) -> list[str]:
    """Ranges in the order in which they begin, each with those around it: ``stage 0/step 1/block 0``."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, shown():
        work()
    found = []
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.is_user_annotation:
            around, path = event.cpu_parent, [event.name]
            while around is not None:
                path += [around.name] if around.is_user_annotation else []
                around = around.cpu_parent
            found.append("/".join(reversed(path)))
    return found


def inside(outer: str, *names: str) -> list[str]:
    return [outer, *(f"{outer}/{name}" for name in names)]


def call(engine: PixelFlowEngine, **options: Any) -> torch.Tensor:
    told = {"class_labels": [1, 2], "num_inference_steps": [1, 2], "output_type": "pt"} | options
    return engine(told.pop("class_labels"), **told).images  # type: ignore[return-value]


def step(number: int, *names: str) -> list[str]:
    return inside(f"step {number}", *names)


def test_stage_step_block_the_exact_way() -> None:
    evaluation = ["modulations", *BLOCKS]
    expected = inside("stage 0", *step(0, *evaluation))
    expected += inside("stage 1", "enter", *step(0, *evaluation), *step(1, *evaluation))
    assert seen(lambda: call(tiny_engine(**SHAPE))) == expected


def test_stage_step_block_the_fast_way() -> None:
    expected = inside("stage 0", "modulations", *step(0, *BLOCKS))
    expected += inside("stage 1", "enter", "modulations", *step(0, *BLOCKS), *step(1, *BLOCKS))
    assert seen(lambda: call(packed_engine(**SHAPE))) == expected


@both_ways
def test_a_step_of_heuns_has_two_evaluations(make: Callable[..., PixelFlowEngine]) -> None:
    found = seen(lambda: call(make(**SHAPE), solver="heun"))
    assert [name for name in found if "block" in name] == [
        f"stage {stage}/step {number}/{block}" for stage, number in ((0, 0), (1, 0), (1, 1)) for block in 2 * BLOCKS
    ]


@both_ways
def test_dopri5_starts_and_attempts(make: Callable[..., PixelFlowEngine]) -> None:
    engine, reports = make(num_stages=1, resolution=4), []
    told = {"solver": "dopri5", "num_inference_steps": 1, "callback_on_stage_end": reports.append}
    found = seen(lambda: call(engine, rtol=10.0, atol=1.0, **told))
    (event,) = reports
    launched = (event.report.evaluations - 2) // 6
    assert launched >= event.report.steps > 1, "the fast way may have launched an attempt that moved nobody"
    evaluation = ["modulations", "block 0"]
    steps = [name for number in range(launched) for name in step(number, *6 * evaluation)]
    assert found == inside("stage 0", *inside("start", *2 * evaluation), *steps)


@both_ways
def test_prompts_are_projected_under_a_name(make: Callable[..., PixelFlowEngine]) -> None:
    engine = make(**SHAPE, num_classes=0, cross_attention_dim=12)
    text = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0))
    told = {"encoder_hidden_states": text, "null_encoder_hidden_states": text, "guidance_schedule": "stagewise"}
    found = seen(lambda: call(engine, class_labels=None, **told))  # in stage 1 with null halves, in stage 0 without
    assert [name for name in found if "text" in name] == ["stage 0/text", "stage 1/text"]


@both_ways
def test_nothing_where_nobody_asked(make: Callable[..., PixelFlowEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(**SHAPE)
    with ranges_shown():
        expected = call(engine)

    def refuse(*_: object) -> None:
        raise AssertionError("a range was begun")

    monkeypatch.setattr(ranges, "record_function", refuse)
    monkeypatch.setattr(torch.cuda, "nvtx", None)
    assert seen(lambda: call(engine), nullcontext) == []
    assert torch.equal(call(engine), expected), "ranges change nothing"


def test_they_are_shown_to_those_who_ask() -> None:
    def other_thread() -> None:
        thread = threading.Thread(target=lambda: names.append(named("x")))
        thread.start()
        thread.join()

    names: list[object] = []
    with ranges_shown():
        with ranges_shown():
            names.append(named("x"))
        names.append(named("x"))
        other_thread()
    names.append(named("x"))
    assert [isinstance(name, record_function) for name in names] == [True, True, False, False]


# --- NVTX --------------------------------------------------------------------------------------------------


class Nvtx:
    """Stands for ``torch.cuda.nvtx``: who is open, and all who ever were."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.pushed: list[str] = []

    def range_push(self, name: str) -> None:
        self.open.append(name)
        self.pushed.append("/".join(self.open))

    def range_pop(self) -> None:
        self.open.pop()


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Nvtx:
    monkeypatch.setattr(torch.cuda, "nvtx", double := Nvtx())
    return double


@contextmanager
def ranges_shown_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they are on a machine with a GPU; the engine itself sees none."""
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            stack.enter_context(ranges_shown())
        yield


@both_ways
def test_nvtx_has_the_profilers_ranges(
    make: Callable[..., PixelFlowEngine], nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(**SHAPE)
    with ranges_shown_on_gpu(monkeypatch):
        found = seen(lambda: call(engine), nullcontext)
    assert len(found) > 10
    assert nvtx.pushed == found
    assert nvtx.open == []


@both_ways
@pytest.mark.parametrize("when", ["callback_on_step_end", "callback_on_stage_end"])
def test_an_error_in_a_callback_leaves_no_range_open(
    make: Callable[..., PixelFlowEngine], when: str, nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: object) -> None:
        raise KeyError("stop")

    with ranges_shown_on_gpu(monkeypatch):
        with pytest.raises(KeyError, match="stop"):
            call(make(**SHAPE), **{when: stop})
        assert nvtx.open == []
        assert nvtx.pushed[0] == "stage 0"
        assert "stage 0/step 0" in nvtx.pushed


def test_a_stream_left_alone_has_no_range_open(nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch) -> None:
    with ranges_shown_on_gpu(monkeypatch):
        stream = tiny_engine(**SHAPE).stream([1], num_inference_steps=1)
        next(stream)
        assert nvtx.pushed[0] == "stage 0"
        assert nvtx.open == []


def test_a_build_without_cuda_has_no_nvtx(nvtx: Nvtx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with ranges_shown(), named("x"):
        pass
    assert nvtx.pushed == []


# --- compiled and captured ---------------------------------------------------------------------------------


def test_compiled_code_has_none_inside_and_stays_whole() -> None:
    engine = packed_engine(**SHAPE)
    expected = call(engine)
    model = engine.model
    model.trunk = torch.compile(model.trunk, backend="eager", fullgraph=True)  # type: ignore[method-assign]
    found: list[torch.Tensor] = []
    try:
        names = seen(lambda: found.append(call(engine)))
        again = seen(lambda: found.append(call(engine)))
    finally:
        torch._dynamo.reset()
    ours = [name for name in names if not name.startswith("Torch") and "step" in name]
    assert [name.split("/")[1] for name in ours if name.count("/") == 1] == ["step 0", "step 0", "step 1"]
    assert not any("block" in name for name in (*names, *again))
    for images in found:
        assert torch.equal(images, expected)


def test_a_replayed_step_is_one_range() -> None:
    """What the step's blocks are named is seen while it warms up and is captured."""
    engine = packed_engine(capture := RecordingCapture(), **SHAPE)
    found: list[torch.Tensor] = []
    first = seen(lambda: found.append(call(engine)))
    second = seen(lambda: found.append(call(engine)))
    assert capture.captured == 2
    captured = inside("capture euler", *3 * BLOCKS)
    assert first == [
        *inside("stage 0", "modulations", *captured, "step 0"),
        *inside("stage 1", "enter", "modulations", *captured, "step 0", "step 1"),
    ]
    assert second == [name for name in first if "capture" not in name]
    expected = call(packed_engine(**SHAPE))
    for images in found:
        assert torch.equal(images, expected)
