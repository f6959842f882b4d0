"""What makes the host wait for the device, counted without one.

On fake CUDA tensors a whole cascade of fixed steps runs as it would on a GPU, and whatever reads a value or copies
without ``non_blocking`` is noted. On a CPU an engine whose clock says that the host runs ahead is seen to look at
statuses and times at the end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixelflow_benchmarks.harness.tracing import fake, fake_cuda, fake_parameters
from pixelflow_engine import PixelFlowEngine, StageEvent
from pixelflow_engine.events import Callbacks
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.fusion import fuse
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.operations import Operations, Text
from pixelflow_engine.packed_stages import PackedStages, ProgramStore
from pixelflow_engine.plain_stages import PlainStages
from pixelflow_engine.plan import Condition, Group, SamplingPlan, plan_stages
from pixelflow_engine.sampler import sample
from pixelflow_engine.solvers import Tolerance
from pixelflow_engine.traceable import TraceableOperations
from support.engines import tiny_config
from support.kernels import assert_same_bits
from support.recording import packed_engine
from support.waits import name_of, waits

CUDA = torch.device("cuda", 0)
COPIES = {"_to_copy", "copy_"}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
HOST_READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


class Waits(TorchDispatchMode):
    """Notes operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        out = func(*args, **kwargs)
        devices = {x.device.type for x in (*args, out) if isinstance(x, Tensor)}
        copies = name in COPIES and len(devices) > 1 and not _at_once(args, kwargs)
        if copies or waits(func, args, kwargs, lambda x: x.is_cuda) is not None:
            self.seen.append(name)
        return out


def _at_once(args: Any, kwargs: Any) -> bool:
    """Whether a copy lets the host go on."""
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


class Makes(TorchFunctionMode):
    """Notes tensors that are made on a device of Python's numbers, and truth values used as an index."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MAKERS and out.device.type == "cuda":
            self.seen.append(func.__name__)
        return out


@contextmanager
def watching() -> Iterator[list[str]]:
    with fake_cuda(), Waits() as waits, Makes(waits.seen):
        yield waits.seen


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: torch.zeros(2).to(CUDA),
        lambda x: x.to("cpu"),
        lambda x: x.copy_(torch.zeros(2)),
        lambda x: x.copy_(torch.zeros(2), False),
    ],
)
def test_the_watch_sees_what_waits(wait: Callable[[Tensor], object]) -> None:
    with watching() as seen:
        x = fake((2,), torch.float32)
        torch.zeros(2).to(CUDA, non_blocking=True)
        x.copy_(torch.zeros(2), non_blocking=True)
        assert not seen
        wait(x)
        assert seen


class Ahead:
    """A clock of a device that the host runs ahead of; it notes who asks."""

    ahead = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def mark(self) -> int:
        self.asked.append("mark")
        return len(self.asked)

    def seconds(self, begun: int, ended: int) -> float:
        self.asked.append("seconds")
        return float(ended - begun)


# Attention is one node on fake tensors: that its implementation in PyTorch reads the lengths of images is not seen.
OPERATIONS: dict[str, Callable[[], Operations]] = {
    "fused": lambda: FusedOperations("triton"),
    "traceable": TraceableOperations,
}


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
@pytest.mark.parametrize("text", [False, True])
def test_a_cascade_of_fixed_steps_waits_for_nothing(solver: str, text: bool, operations: str) -> None:
    """Neither in a stage nor between stages: mixed sizes, weights and seeds, guided and not, with and without text."""
    shape: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 72, "patch_size": 4}
    shape |= {"num_classes": 0, "cross_attention_dim": 64} if text else {}
    config = tiny_config(num_stages=3, resolution=64, **shape)
    with torch.device("meta"):
        model = PackedTransformer(config.model, OPERATIONS[operations]())
    groups = [Group(64, 64, ((1.0, 2.0, 3.0), (1.0, 1.5, 2.0))), Group(64, 128, ((1.0, 1.0, 1.0),))]
    plan = SamplingPlan(
        stages=plan_stages(config, groups, (2, 3, 3)), solver=solver, shift=2.0, state="fp32", tolerance=Tolerance()
    )
    with watching() as seen:
        fake_parameters(model, torch.bfloat16)
        fuse(model)
        condition = Condition(class_labels=fake((3,), torch.int64))
        if text:
            prompts, null = (Text(fake((n, 8, 64), torch.bfloat16), fake((n, 8), torch.float32)) for n in (3, 1))
            condition = Condition(text=prompts, null_text=null)
        noise = [CounterNoise((1, 2**64 - 1), CUDA), CounterNoise((3,), CUDA)]
        stages = PackedStages(model, config, plan, condition, ProgramStore(None))
        states = [fake(shape, torch.float32) for shape in plan.stages[0].shapes]
        clock = Ahead()
        ends = list(sample(stages, plan, states, noise, 4, Callbacks(), (2, 0, 1), clock, raising=False, watched=False))
        assert [tuple(x.shape) for x in ends[-1].states] == [(2, 3, 64, 64), (1, 3, 64, 128)]
        assert [len(image.shape) for image in ends[-1].latents] == [3, 3, 3]
        assert clock.asked == ["mark"] * 6
        assert not seen


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_exact_stages_of_fixed_steps_wait_for_nothing(solver: str) -> None:
    config = tiny_config(num_stages=3, resolution=64)
    with torch.device("meta"):
        model = PackedTransformer(config.model)
    plan = SamplingPlan(
        stages=plan_stages(config, [Group(64, 64, ((1.0, 2.0, 3.0),) * 2)], (2, 3, 3)),
        solver=solver,
        shift=2.0,
        state="fp32",
        tolerance=Tolerance(),
    )
    with watching() as seen:
        fake_parameters(model, torch.float32)
        stages = PlainStages(model, config, plan, Condition(class_labels=fake((2,), torch.int64)))
        states = [fake(shape, torch.float32) for shape in plan.stages[0].shapes]
        noise = [CounterNoise((1, 2), CUDA)]
        (*_, end) = sample(stages, plan, states, noise, 4, Callbacks(), (0, 1), Ahead(), raising=False, watched=False)
        assert [tuple(x.shape) for x in end.states] == [(2, 3, 64, 64)]
        assert not seen


def test_what_is_on_the_host_is_uploaded_without_a_wait() -> None:
    with watching() as seen:
        states, mask = torch.zeros(2, 8, 64, dtype=torch.float64), torch.ones(2, 8, dtype=torch.int64)
        there = Condition(torch.tensor([1, 2]), Text(states, mask), Text(states, None)).to(CUDA, torch.bfloat16)
        assert there.text is not None
        assert (there.text.states.device, there.text.states.dtype) == (CUDA, torch.bfloat16)
        assert there.text.mask is not None
        assert there.text.mask.device == CUDA
        assert not seen


class Reads(TorchFunctionMode):
    """Notes values that come to the host, and how many stages had ended by then."""

    def __init__(self, clock: Ahead) -> None:
        super().__init__()
        self.clock = clock
        self.when: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            self.when.append(self.clock.asked.count("mark") // 2)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    found = Ahead()
    monkeypatch.setattr("pixelflow_engine.engine.clock_of", lambda device: found)
    return found


def test_statuses_and_times_are_read_at_the_end_alone(clock: Ahead) -> None:
    engine: PixelFlowEngine = packed_engine()
    options: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 2, "seed": 1}
    with Reads(clock) as reads:
        found = engine([1, 2], **options)
    assert clock.asked == ["mark"] * 6 + ["seconds"] * 3
    assert reads.when == [3, 3], "once whether to raise, once what became of the images"
    assert found.statuses == ("ok", "ok")
    # Who reads a stage's report is told of that stage.
    seen: list[tuple[int, int]] = []
    watched = engine(
        [1, 2],
        callback_on_stage_end=lambda e: seen.append((e.report.stage, clock.asked.count("seconds"))),
        **options,
    )
    assert seen == [(0, 4), (1, 5), (2, 6)]
    assert_same_bits(found.images, watched.images)


@pytest.mark.parametrize("streamed", [True, False])
def test_previews_wait_for_nothing_but_what_is_read(clock: Ahead, streamed: bool) -> None:
    engine: PixelFlowEngine = packed_engine()
    options: dict[str, Any] = {"on_failure": "report", "num_inference_steps": 2, "seed": 1}
    events: list[StageEvent] = []
    read: list[list[int]] = []

    def look(event: StageEvent) -> None:
        event.images("pt")
        events.append(event)
        read.append(list(reads.when))

    with Reads(clock) as reads:
        if streamed:
            for event in engine.stream([1, 2], **options):
                look(event)
        else:
            engine([1, 2], callback_on_stage_end=look, output_type="pt", **options)
        assert read == [[], [], []]
        reads.when.clear()
        assert [event.statuses for event in events] == [("ok", "ok")] * 3
        assert reads.when == [3, 3, 3]
    before = clock.asked.count("seconds")
    assert before == (0 if streamed else 3)
    assert [event.report.stage for event in events] == [0, 1, 2]
    assert clock.asked.count("seconds") == before + 3


@pytest.mark.parametrize("ahead", [True, False])
def test_a_failure_is_told_of_the_stage_where_it_happened(ahead: bool, clock: Ahead) -> None:
    engine, runs = packed_engine(), []
    table = engine.model.class_embedder.embedding_table  # type: ignore[union-attr]
    table.weight.index_fill_(0, torch.tensor([4]), torch.nan)
    clock.ahead = ahead
    original = PackedStages.run

    def run(*arguments: Any) -> Any:
        runs.append(len(runs))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedStages, "run", run)
        with pytest.raises(FloatingPointError, match=r"^stage 0: images \[1\] of the batch are not finite$"):
            engine([2, 4, 1], num_inference_steps=1, seed=1)
        assert len(runs) == (3 if ahead else 1)
        runs.clear()
        with pytest.raises(FloatingPointError, match=r"^stage 0: images \[1\]"):
            next(engine.stream([2, 4, 1], num_inference_steps=1, seed=1))
        assert len(runs) == 1, "who looks at every stage is told at once"
        runs.clear()
        with pytest.raises(FloatingPointError, match=r"^stage 0: images \[1\]"):
            engine([2, 4, 1], num_inference_steps=1, seed=1, callback_on_step_end=lambda event: None)
        assert len(runs) == 1, "who looks at every step too: no step of his is of a stage after it"
