"""Times, memory and energy on a GPU, tried on doubles: two clocks, an account, and a counter that moves in steps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_benchmarks.harness import energy, timing
from pixelflow_benchmarks.harness.energy import WINDOW, joules_of
from pixelflow_benchmarks.harness.timing import RESOLUTION, UNROLL, make_flush, seconds_of, time_calls
from pixelflow_benchmarks.opponents.random_models import SHAPES
from pixelflow_benchmarks.suites.memory.peaks import peak_of
from pixelflow_benchmarks.suites.stages import measure
from pixelflow_benchmarks.suites.stages.problem import Ran, StageProblem
from pixelflow_benchmarks.suites.training.phases import OTHER, PhaseClock
from support.fake_gpu import FakeGpu

CUDA = torch.device("cuda:0")
US = 1e-6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    found = FakeGpu()
    found.install(monkeypatch)
    monkeypatch.setattr(timing, "make_flush", lambda device: found.flush)
    return found


# --- time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [2 * US, 30 * US, 3000 * US])
def test_a_kernel_takes_what_it_takes_with_a_cold_cache(cold: float, gpu: FakeGpu) -> None:
    """Without the host's launches, which take longer than the shortest one here, and without the flush."""
    found = time_calls({"one": lambda: gpu.kernel(cold, cold / 3)}, CUDA, repeats=3)["one"]
    assert found.turns == pytest.approx([cold] * 3, rel=1e-6)
    assert found.captured


def test_a_call_of_many_kernels_has_their_sum(gpu: FakeGpu) -> None:
    """The first alone finds a cold cache."""

    def call() -> None:
        for _ in range(7):
            gpu.kernel(3 * US, 2 * US)

    assert time_calls({"seven": call}, CUDA, repeats=3)["seven"].median == pytest.approx(15 * US, rel=1e-6)


def test_a_call_that_waits_is_launched_each_time_and_says_so(gpu: FakeGpu) -> None:
    """It cannot be captured: the host's time is in its figure, and the others are captured all the same."""

    def waits() -> None:
        gpu.kernel(10 * US, 10 * US)
        gpu.wait()

    found = time_calls({"waits": waits, "goes on": lambda: gpu.kernel(4 * US, 4 * US)}, CUDA, repeats=3)
    assert (found["waits"].captured, found["goes on"].captured) == (False, True)
    assert found["waits"].median > 10 * US
    assert found["goes on"].median == pytest.approx(4 * US, rel=1e-6)
    assert gpu.kept is None
    assert gpu.ended, "the allocator goes on filling a pool unless it is told that its capture has failed"
    assert len(gpu.current) == 1, "the caller's stream is the current one again"


def test_a_call_whose_graph_lacks_memory_is_launched_each_time(gpu: FakeGpu) -> None:
    def call() -> None:
        if gpu.kept is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        gpu.kernel(10 * US, 10 * US)

    found = time_calls({"large": call, "goes on": lambda: gpu.kernel(4 * US, 4 * US)}, CUDA, repeats=3)
    assert (found["large"].captured, found["goes on"].captured) == (False, True)


def test_a_call_that_fails_costs_the_others_nothing(gpu: FakeGpu) -> None:
    def fail() -> None:
        raise RuntimeError("no kernel\nand more")

    failed: dict[str, str] = {}
    calls = {"fails": fail, "goes on": lambda: gpu.kernel(4 * US, 4 * US)}
    found = time_calls(calls, CUDA, repeats=3, failed=failed)
    assert found.keys() == {"goes on"}
    assert found["goes on"].median == pytest.approx(4 * US, rel=1e-6)
    assert failed == {"fails": "RuntimeError: no kernel"}


def test_what_is_shorter_than_an_event_tells_is_not_nothing(gpu: FakeGpu) -> None:
    """A speed is something over it."""
    found = time_calls({"nothing": lambda: None}, CUDA, repeats=3)["nothing"]
    assert found.turns == (RESOLUTION / UNROLL,) * 3


def test_graphs_are_gone_afterwards(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[object] = []
    graph: Any = torch.cuda.CUDAGraph
    monkeypatch.setattr(graph, "reset", lambda self: reset.append(self))
    time_calls({name: lambda: gpu.kernel(US, US) for name in "abc"}, CUDA, repeats=3)
    assert len(set(map(id, reset))) == 4, "and the one that only flushes"


def test_a_run_is_over_when_the_device_is(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched before it does not count, what it launched does."""
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    gpu.kernel(1.0, 1.0)
    seconds, found = seconds_of(lambda: gpu.kernel(0.5, 0.5), CUDA)
    assert seconds == pytest.approx(0.5, rel=1e-3)
    assert found is None


def test_parts_of_a_step_are_the_devices_time_and_nothing_waits_between_them(gpu: FakeGpu) -> None:
    """A part is what passes on the device until it is done, though the host is long past it."""
    clock = PhaseClock(CUDA)
    gpu.kernel(1.0, 1.0)  # what was launched before the step is not in it
    for _ in range(2):
        with clock.step():
            began = gpu.host
            with clock("forward"):
                gpu.kernel(2e-3, 2e-3)
            with clock("backward"):
                gpu.kernel(5e-3, 5e-3)
            gpu.kernel(1e-3, 1e-3)
            with clock("forward"):
                gpu.kernel(2e-3, 2e-3)
            assert gpu.host - began < 1e-4, "launched, and waited for nowhere"
    shares = clock.shares()
    assert clock.whole == pytest.approx(2 * 10e-3, rel=0.01)
    assert shares["forward"] == pytest.approx(0.4, abs=0.01)
    assert shares["backward"] == pytest.approx(0.5, abs=0.01)
    assert shares[OTHER] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("cache", [0, 2**20, 50 * 2**20])
def test_a_flush_reads_more_than_the_cache_holds(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes a number: lines that it had written would be written back in the time of what comes next."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    seen: list[tuple[int, int]] = []
    amax = torch.amax

    def spy(x: Tensor, dim: int, out: Tensor) -> Tensor:
        seen.append((x.nbytes, out.nbytes))
        return amax(x, dim=dim, out=out)

    monkeypatch.setattr(torch, "amax", spy)
    make_flush(torch.device("cpu"))()
    ((read, written),) = seen
    assert read >= 2 * cache
    assert read >= 64 * 2**20, "where the size is not known"
    assert written == 4


# --- memory ------------------------------------------------------------------------------------------------


class Allocator:
    """PyTorch's account of a GPU: what is given out now, and the most since it was last told to forget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        for name, call in {
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: 2 * self.peak,
            "reset_peak_memory_stats": lambda device: self.take(0, forget=True),
        }.items():
            monkeypatch.setattr(torch.cuda, name, call)

    def take(self, count: int, forget: bool = False) -> None:
        self.now += count
        self.peak = self.now if forget else max(self.peak, self.now)


def test_the_peak_of_a_stage_is_beside_what_lay_there(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' weights, and a larger peak of theirs, are not this run's; what it keeps and what it returns are."""
    allocator = Allocator(monkeypatch)
    allocator.take(10_000)
    allocator.take(-9_900)
    ran = Ran(torch.zeros(1), torch.zeros(1), steps=4, evaluations=4)

    class Run:
        def run(self, keep_first: bool = False) -> Ran:
            gpu.kernel(0.25, 0.25)
            allocator.take(700)
            allocator.take(-650)
            return ran

    problem = StageProblem(
        config=SHAPES["tiny"], stage=1, batch=2, steps=4, solver="euler", dtype=torch.bfloat16, device=CUDA
    )
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    got, found = measure._first_run(Run(), problem)  # type: ignore[arg-type]
    assert got is ran
    assert found["peak_bytes"] == 700
    assert found["first_seconds"] == pytest.approx(0.25, rel=1e-3), "until the device is done"


def test_a_graphs_pool_is_part_of_a_peak(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replay uses lies in the pool, of which the allocator counts what tensors hold; other pools are others'."""
    allocator = Allocator(monkeypatch)
    allocator.take(400)
    segments = [
        {"segment_pool_id": (0, 7), "total_size": 1000, "allocated_size": 100},
        {"segment_pool_id": (0, 7), "total_size": 500, "allocated_size": 50},
        {"segment_pool_id": (0, 0), "total_size": 9000, "allocated_size": 9000},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)

    def run() -> None:
        allocator.take(30)
        allocator.take(-30)

    found = peak_of(run, CUDA, before=100, pool=(0, 7))
    assert found == {"activations": 330 + 1500 - 150, "reserved_bytes": 860, "pool_bytes": 1500}
    assert peak_of(run, CUDA, before=100, pool=None)["activations"] == 330


# --- energy ------------------------------------------------------------------------------------------------


class Board:
    """NVML's bindings to a board whose counter moves every ``step`` seconds; it draws 700 W while it works, else 100.

    Args:
        clock: the fake GPU's.
        step: seconds; None for a counter that stands still.
    """

    class NVMLError(Exception):
        """As the bindings name theirs."""

    def __init__(self, clock: FakeGpu, step: float | None) -> None:
        self.clock, self.step, self.known = clock, step, True
        self.begun = self.ended = 0
        self.busy = 0.0
        self.readings: list[tuple[float, float]] = [(0.0, 0.0)]

    def work(self, seconds: float) -> None:
        """The device is busy; the host waits for it."""
        self.clock.launch(lambda: seconds)
        self.busy += seconds

    def nvmlInit(self) -> None:  # noqa: N802
        self.begun += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.ended += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not self.known:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "GPU-u"
        if self.step is None:
            return 123
        now = self.clock.host
        self.readings.append((now, 100 * (now - self.busy) + 700 * self.busy))
        at = now // self.step * self.step  # what was used until the counter's last step
        (t0, e0), (t1, e1) = next((a, b) for a, b in zip(self.readings, self.readings[1:], strict=False) if b[0] >= at)
        return int(1000 * (e0 + (e1 - e0) * (at - t0) / (t1 - t0 or 1.0)))


def board(gpu: FakeGpu, step: float | None, monkeypatch: pytest.MonkeyPatch) -> Board:
    import sys

    found = Board(gpu, step)
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u", name="A GPU"))
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(energy, "state", lambda device: {"sm_mhz": 1755})
    return found


@pytest.mark.parametrize("seconds", [0.0007, 0.013, 0.11, 0.33, 1.3, 5.0])
@pytest.mark.parametrize("step", [0.02, 0.1])
def test_energy_is_power_times_time(step: float, seconds: float, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """However runs and the counter's steps fall; off by a run or a step of the window at most."""
    counter = board(gpu, step, monkeypatch)
    found = joules_of(lambda: counter.work(seconds), CUDA)
    off = min(step, seconds) / WINDOW
    assert found["joules"] == pytest.approx(700 * seconds, rel=0.01 + off)
    assert found["watts"] == pytest.approx(700, rel=0.01 + off)
    assert found["energy_seconds"] >= WINDOW
    assert gpu.host < max(3 * WINDOW, 2.5 * seconds), "it comes to an end"
    assert counter.begun == counter.ended > 0


@pytest.mark.parametrize("waits", [True, False])
def test_the_device_is_looked_at_while_it_works(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a run returns when its work is done or when it is launched; in real time, unlike the others here."""
    until = 0.0

    def run() -> None:
        nonlocal until
        until = time.perf_counter() + 0.3
        if waits:
            time.sleep(0.3)

    def wait_for(device: torch.device) -> None:
        time.sleep(max(0.0, until - time.perf_counter()))

    monkeypatch.setattr(energy, "wait_for", wait_for)
    monkeypatch.setattr(energy, "state", lambda device: {"busy": time.perf_counter() < until})
    found = energy._counted(run, CUDA, 0.4, lambda: int(time.perf_counter() * 1e6))
    assert found["at_work"] == {"busy": True}
    assert found["energy_seconds"] >= 0.4


def test_a_counter_that_stands_still_says_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = board(gpu, None, monkeypatch)
    assert joules_of(lambda: counter.work(0.01), CUDA) == {}
    assert gpu.host < 5


@pytest.mark.parametrize("lacking", ["name", "counter", "driver"])
def test_a_board_that_does_not_count_is_not_kept_busy(
    lacking: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a GPU has no name that the driver knows, an old board no counter."""
    counter = board(gpu, 0.1, monkeypatch)

    def refuse(*_: object) -> None:
        raise Board.NVMLError("not supported")

    if lacking == "name":
        counter.known = False
    else:
        called = {"counter": "nvmlDeviceGetTotalEnergyConsumption", "driver": "nvmlInit"}[lacking]
        monkeypatch.setattr(counter, called, refuse)
    ran: list[None] = []
    assert joules_of(lambda: ran.append(None), CUDA) == {}
    assert ran == []
