"""What an engine says when the device's memory is too small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.opponents.random_models import SHAPES
from pixelflow_benchmarks.suites.memory.counted import FUSED, count
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_engine import memory
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.plan import StagePlan
from pixelflow_engine.schedule import make_stages
from support.engines import tiny_engine
from support.recording import RecordingCapture, packed_engine

MIB = 2**20
PYTORCHS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"


def broken(monkeypatch: pytest.MonkeyPatch, *, allocated: list[int], free: int, message: str = PYTORCHS) -> Any:
    """An engine that runs out of memory; ``allocated`` MiB are there before and when it does."""
    engine = packed_engine(RecordingCapture())
    amounts = iter(allocated)
    monkeypatch.setattr(memory, "allocated", lambda device: next(amounts) * MIB)
    monkeypatch.setattr(memory, "free", lambda device: free * MIB)

    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError(message)

    monkeypatch.setattr(engine.model, "trunk", fail)
    return engine


@pytest.mark.parametrize(("free", "fit"), [(0, 4), (10, 5), (1000, 5)])
def test_it_says_how_many_images_would_fit(monkeypatch: pytest.MonkeyPatch, free: int, fit: int) -> None:
    """Six images had 60 MiB and wanted 20 more; there is room for (60 + free) / 80 * 6 of them, and not for six."""
    engine = broken(monkeypatch, allocated=[100, 160], free=free)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        engine(range(6), seed=0, output_type="pt")
    text = str(caught.value)
    assert f"6 images at once, about 13 MiB each; about {fit} would fit in one batch" in text
    assert f"batch_sizes=[{fit}]" in text
    assert PYTORCHS in text
    assert str(caught.value.__cause__) == PYTORCHS
    assert not engine._programs.programs


def test_images_that_fail_early_are_told_of_the_largest_stage() -> None:
    """Eight had 8 MiB of the 160 that they need when 2 more failed: of 60 MiB there is room for three, not for all."""
    device, amounts = torch.device("cpu"), iter([0, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "allocated", lambda device: next(amounts) * MIB)
        patch.setattr(memory, "free", lambda device: 52 * MIB)
        with (
            pytest.raises(torch.cuda.OutOfMemoryError, match="about 20 MiB each; about 3 would fit"),
            memory.told_what_fits(device, 8, least=160 * MIB),
        ):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


@pytest.mark.parametrize(("stage", "dtype"), [(3, torch.bfloat16), (2, torch.bfloat16), (3, torch.float32)])
def test_the_least_is_near_what_is_counted(stage: int, dtype: torch.dtype) -> None:
    """Against the live bytes of a stage on fake tensors: published width, two blocks, ten steps, two images more."""
    shape = replace(SHAPES["xl"], model=replace(SHAPES["xl"].model, depth=2))
    found, least = [], []
    for batch in (1, 3):
        problem = StageProblem(
            config=shape, stage=stage, batch=batch, steps=10, solver="euler", dtype=dtype, device=torch.device("cuda")
        )
        found.append(count(FUSED, problem).activations)
        plan = StagePlan(
            stage=make_stages(shape.scheduler)[stage],
            shapes=(problem.shape,),
            weights=(problem.weight,) * batch,
            num_steps=10,
        )
        least.append(memory.least_bytes(shape.model, [plan], dtype, table=True))
    assert 0.7 <= (least[1] - least[0]) / (found[1] - found[0]) <= 1.05, (least, found)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("build", [packed_engine, tiny_engine], ids=["packed", "exact"])
def test_the_least_counts_no_table_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, build: Any, classes: int, solver: Any
) -> None:
    engine = build(num_stages=1, resolution=8, num_classes=classes)
    made, calls = [], []
    modulations, least_bytes = PackedTransformer.all_modulations_of, memory.least_bytes

    def watched(*given: Any) -> Any:
        made.append(modulations(*given))
        return made[-1]

    def counted(*given: Any) -> int:
        calls.append(given)
        return least_bytes(*given)

    monkeypatch.setattr(PackedTransformer, "all_modulations_of", watched)
    monkeypatch.setattr(memory, "least_bytes", counted)
    engine([1, 2, 3] if classes else None, solver=solver, seed=[1, 2, 3], guidance_scale=1.0, output_type="pt")
    ((*given, table),) = calls
    of_table = least_bytes(*given, table) - least_bytes(*given, False)
    assert of_table <= (made[0].nbytes if table else 0)
    assert table == (build is packed_engine and solver != "dopri5") == (of_table > 0)


@pytest.mark.parametrize("labels", [[1], [1, 2]])
def test_where_not_even_one_fits(monkeypatch: pytest.MonkeyPatch, labels: list[int]) -> None:
    engine = broken(monkeypatch, allocated=[0, 5], free=1)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"not even one would fit: free memory, or ask for a smaller"):
        next(engine.stream(labels))


def test_a_message_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = broken(monkeypatch, allocated=[0, 0], free=1, message="CUDA error: out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError, match="3 images at once, about 0 MiB each; about 2 would fit"):
        engine([1, 2, 3], output_type="pt")


@pytest.mark.parametrize(
    ("text", "size"),
    [("Tried to allocate 1.50 GiB.", 3 * 2**29), ("Tried to allocate 512 bytes", 512), ("2.00 KiB free", 0), ("", 0)],
)
def test_what_was_tried(text: str, size: int) -> None:
    assert memory.tried(text) == size


def allocator(monkeypatch: pytest.MonkeyPatch, fraction: float, reserved: int, allocated: list[int]) -> None:
    """A GPU of 800 MiB of which 500 are free, as PyTorch reports it; ``allocated`` MiB of a process's are in use."""
    amounts = iter(allocated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500 * MIB, 800 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(amounts) * MIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)


@pytest.mark.parametrize(
    ("fraction", "free"),
    [
        (1.0, 500 + 80),  # all that is free, and 80 reserved but unused
        (0.875, 500 + 80),  # 700 allowed: exactly what is free and reserved
        (0.5, 200 + 80),  # 400 allowed, of which 200 are reserved
        (0.125, 80),  # less allowed than is reserved: no more, but that is still there
    ],
)
def test_what_is_free_to_a_process(monkeypatch: pytest.MonkeyPatch, fraction: float, free: int) -> None:
    allocator(monkeypatch, fraction, reserved=200, allocated=[120])
    assert memory.free(torch.device("cuda")) == free * MIB


@pytest.mark.parametrize(("fraction", "fit"), [(1.0, 6), (0.5, 4)])
def test_what_a_process_may_not_have_is_not_offered(monkeypatch: pytest.MonkeyPatch, fraction: float, fit: int) -> None:
    """Seven had 80 MiB of 630 when an allocation failed: of 660 MiB there is room for all but one, of 360 for four."""
    allocator(monkeypatch, fraction, reserved=200, allocated=[40, 120, 120])
    with (
        pytest.raises(torch.cuda.OutOfMemoryError, match=f"7 images at once, about 90 MiB each; about {fit} would fit"),
        memory.told_what_fits(torch.device("cuda"), 7, least=630 * MIB),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError, match="stop"), memory.told_what_fits(torch.device("cpu"), 3):
        raise KeyError("stop")


def test_the_hosts_memory_is_an_error_of_its_own() -> None:
    """PyTorch's allocator of the host raises a bare RuntimeError; others pass."""
    with (
        pytest.raises(MemoryError, match=r"^out of memory: 3 images at once; ask for fewer"),
        memory.told_what_fits(torch.device("cpu"), 3),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"^another$"), memory.told_what_fits(torch.device("cpu"), 3):
        raise RuntimeError("another")
