"""The simulated device: it holds programs to what holds on a real one, and some tests for GPUs run on it here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import layer_norm_modulate
from pixelflow_kernels.ode_step import euler_step
from pixelflow_kernels.transfers import Download, uploaded
from support.compiled import compiles
from support.kernels import assert_same_bits
from support.simulation import SimulatedDevice

pytestmark = compiles
ROOT = Path(__file__).parents[1]
REHEARSED = [
    "tests/training/test_batches_gpu.py",
    "tests/engine/test_engine_gpu.py::test_no_call_waits_before_its_end[euler-True]",
    "tests/engine/test_engine_gpu.py::test_two_engines_side_by_side",
    "tests/benchmarks/test_suites_gpu.py::test_every_variant_runs_and_is_right[images]",
]


@pytest.fixture(scope="module")
def device() -> SimulatedDevice:
    return SimulatedDevice(90)


@pytest.fixture
def gpu(device: SimulatedDevice) -> Iterator[torch.device]:
    with device.active():
        yield torch.device("cuda")


# --- where tensors are -------------------------------------------------------------------------------------


def test_there_is_no_device_afterwards(device: SimulatedDevice) -> None:
    before = torch.cuda.is_available(), torch.Generator, torch.compile
    with device.active():
        assert torch.cuda.is_available()
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0)
    assert (torch.cuda.is_available(), torch.Generator, torch.compile) == before
    assert x.device.type == "cpu"


def test_results_are_where_their_operands_are(gpu: torch.device) -> None:
    x = torch.arange(12.0).to(gpu)
    assert x.is_cuda
    for y in (x + 1, x[3:].view(3, 3).T, torch.empty_like(x), x.new_zeros(2), x.sum(), torch.cat([x, x]), x.double()):
        assert y.device == torch.device("cuda", 0)
    assert not x.cpu().is_cuda
    assert not torch.empty_like(x, device="cpu").is_cuda
    assert torch.nn.Linear(3, 4).to(gpu).weight.is_cuda
    weight = torch.nn.Parameter(torch.ones(3, device=gpu))
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_cuda


def test_a_move_is_a_copy(gpu: torch.device) -> None:
    x = torch.zeros(3)
    there, back = x.to(gpu), x.to(gpu).cpu()
    there += 1
    assert x.tolist() == back.tolist() == [0, 0, 0]
    assert there.to(gpu) is there


def test_devices_do_not_mix(gpu: torch.device) -> None:
    x, y = torch.ones(3, device=gpu), torch.ones(3)
    with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
        x + y
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2], "a number may be anywhere"
    assert x[torch.tensor([0, 2])].is_cuda, "and so may an index"
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(3, device=gpu, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(3, generator=torch.Generator(gpu))
    assert torch.rand(3, device=gpu, generator=torch.Generator(gpu)).is_cuda


def test_memory_is_what_tensors_hold(gpu: torch.device) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device=gpu)
    y = x[500:]
    assert torch.cuda.memory_allocated() == before + 4000
    del x
    assert torch.cuda.memory_allocated() == before + 4000
    del y
    assert torch.cuda.memory_allocated() == before
    torch.cuda.set_per_process_memory_fraction((before + 3000) / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1000, device=gpu)
    torch.cuda.set_per_process_memory_fraction(1.0)


# --- kernels -----------------------------------------------------------------------------------------------


def test_operations_launch_their_kernels(device: SimulatedDevice) -> None:
    from pixelflow_kernels.ode_step.kernels import launch_euler

    x, v, step = torch.randn(2, 50), torch.randn(2, 50), torch.tensor([0.1, 0.2])
    expected = euler_step(x, v, step)
    with device.active() as emulator:
        found = euler_step(x.cuda(), v.cuda(), step.cuda())
        assert emulator.launched
        assert found.is_cuda
        assert_same_bits(found, expected.cuda())
        with pytest.raises(ValueError, match=r"Pointer argument cannot be accessed from Triton \(cpu tensor\?\)"):
            launch_euler(x.cuda(), v, step.cuda(), None, torch.empty_like(found), 2)


def test_operations_may_be_plain_pytorch_instead() -> None:
    layout = PackedLayout.from_grids([(2, 3)])
    x, rows = torch.randn(6, 16), torch.randn(2, 1, 16)
    with SimulatedDevice(90, emulated=False).active() as emulator:
        there = PackedLayout.from_grids([(2, 3)], "cuda")
        found = layer_norm_modulate(x.cuda(), *rows.cuda(), there)
        assert not emulator.launched
        assert found.is_cuda
        found = found.cpu()
    assert_same_bits(found, layer_norm_modulate(x, *rows, layout))


# --- waiting -----------------------------------------------------------------------------------------------


def event() -> torch.cuda.Event:
    recorded = torch.cuda.Event(enable_timing=True)
    recorded.record()
    return recorded


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the device": lambda x: torch.ones(3).to("cuda"),
    "copy_": lambda x: x.copy_(torch.ones(4)),
    "made of numbers": lambda x: torch.tensor([1.0], device="cuda"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask assigned to": lambda x: x.__setitem__(x > 0, x + 1),
    "list": lambda x: x[[0, 2]],
    "index of the host": lambda x: x[torch.tensor([0, 2])],
    "number put": lambda x: x.__setitem__(torch.zeros(1, dtype=torch.int64, device="cuda"), 2.0),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "allclose": lambda x: torch.allclose(x, x),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().bincount(),
    "repr": repr,
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
}
REFUSED = {
    "to the device": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "cuda": lambda x: torch.ones(3).cuda(non_blocking=True),
    "copy_": lambda x: x.copy_(torch.ones(4), non_blocking=True),
    "copy_ to the host": lambda x: torch.ones(4).copy_(x, non_blocking=True),
    "_foreach_copy_": lambda x: torch._foreach_copy_([x], [torch.ones(4)], non_blocking=True),
    "device": lambda x: torch.cuda.synchronize(),
    "event": lambda x: event().synchronize(),
    "event's query": lambda x: event().query(),
    "event's time": lambda x: event().elapsed_time(event()),
    "download": lambda x: Download(x).wait(),
}
"""What a capture refuses although the mode for errors does not know of it."""
PASSES = {
    "pinned": lambda x: uploaded(torch.ones(3), x.device),
    "download": lambda x: Download(x),
    "fill": lambda x: x.fill_(1.0),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "mask assigned a number": lambda x: x.__setitem__(x > 0, 0.0),
    "mask of the host": lambda x: x[torch.ones(4) > 0],
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "number of the host as index": lambda x: x[torch.tensor(1)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where, of numbers": lambda x: torch.where(x > 0, 1.0, 0.0),
    "made on it": lambda x: torch.zeros(3, device="cuda"),
    "of the host": lambda x: torch.ones(3).sum().item(),
}


@pytest.mark.parametrize("waits", WAITS.values(), ids=WAITS)
def test_waiting_is_an_error_if_asked_for_and_in_a_capture(
    gpu: torch.device, waits: Callable[[torch.Tensor], object]
) -> None:
    x, graph = torch.ones(4, device=gpu), torch.cuda.CUDAGraph()
    waits(x)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        waits(x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
        waits(x)


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_a_capture_refuses_more(gpu: torch.device, refused: Callable[[torch.Tensor], object]) -> None:
    x, graph = torch.ones(4, device=gpu), torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    refused(x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match=r"stream is capturing|during CUDA graph capture"), torch.cuda.graph(graph):
        refused(x)


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_what_does_not_wait_passes(gpu: torch.device, passes: Callable[[torch.Tensor], object]) -> None:
    x, graph = torch.ones(4, device=gpu), torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    passes(x)
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        passes(x)


def test_a_download_is_of_its_time(gpu: torch.device) -> None:
    x = torch.ones(2, device=gpu)
    download = Download(x)
    x += 1
    assert download.wait().tolist() == [1, 1]
    assert Download(torch.ones(2)).wait().tolist() == [1, 1]


# --- graphs ------------------------------------------------------------------------------------------------


def test_a_capture_executes_nothing_and_a_replay_repeats_it(gpu: torch.device) -> None:
    x, weights = torch.ones(2, 50, device=gpu), torch.full((2,), 0.5, device=gpu)
    graph, total = torch.cuda.CUDAGraph(), torch.zeros((), device=gpu)
    with torch.cuda.graph(graph):
        out = euler_step(x, x, weights)
        total += out.sum()
    assert total.item() == 0
    assert bool(out.isnan().all()), "not written yet"
    for _ in range(2):
        graph.replay()
    assert total.item() == 300
    weights.fill_(1.0)
    graph.replay()
    assert out.tolist() == [[2.0] * 50] * 2


def test_a_graph_copies_page_locked_memory_again(gpu: torch.device) -> None:
    x, y = torch.ones(3).pin_memory(), torch.ones(3).pin_memory()
    there, graph = torch.ones(3, device=gpu), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.copy_(x, non_blocking=True)
        y.copy_(there + 1, non_blocking=True)
    assert there.tolist() == y.tolist() == [1, 1, 1]
    x.fill_(5)
    graph.replay()
    assert (there.tolist(), y.tolist()) == ([5, 5, 5], [6, 6, 6])


def test_a_graph_needs_the_memory_that_it_reads(gpu: torch.device) -> None:
    x, out, graph = torch.ones(3, device=gpu), torch.zeros(3, device=gpu), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x)
    del x
    with pytest.raises(RuntimeError, match="memory that was given up"):
        graph.replay()


# --- tests for GPUs ----------------------------------------------------------------------------------------


def test_some_tests_for_gpus_pass_on_it() -> None:
    """In a process of its own, as ``make rehearse`` runs all of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.rehearsal", "-p", "no:cacheprovider", "-m", "gpu"]
    environment = os.environ | {"PYTHONPATH": "tests", "PIXELFLOW_REHEARSE_KERNELS": "plain", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *REHEARSED], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 passed" in done.stdout
