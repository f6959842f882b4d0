"""Peaks of real runs: stages of the model by every opponent, and a training step's forward and backward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.suites.stages.measure import ends_of, stage_faults
from pixelflow_benchmarks.suites.stages.opponents import Opponents
from pixelflow_benchmarks.suites.stages.problem import REFERENCE, Ran, StageProblem
from pixelflow_benchmarks.suites.stages.runs import EngineRun, true_first_state
from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.graphs import CudaCapture

from .peaks import Pool, peak_of, settle
from .records import memory_figures, memory_head, size_of, skipped, with_slopes
from .training import training_step

TRAINING = "torch, forward and backward"
ON_CPU = (REFERENCE, "torch/eager", "torch/compiled", TRAINING)
ON_GPU = (REFERENCE, "triton/graphs", "triton/eager", "torch/eager", "triton/both", TRAINING)


def measure_memory(
    shape: str,
    config: PixelFlowConfig,
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    batches: Sequence[int],
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    deadline: float = math.inf,
) -> Iterator[Record]:
    """Check every variant at every stage and batch, then take the peak of a run of the right ones.

    Args:
        shape: the model's name.
        config: of the model.
        weights: of all models, exact in ``dtype``.
        names: of variants; the reference, which the others are checked against, is always one.
        batches: images; with guidance the model sees twice as many. Training has as many of every stage.
        steps: Euler's.
        dtype: of the matrix products.
        device: where.
        deadline: after which no stage is begun, on the clock of ``time.perf_counter``.

    Yields:
        ``memory`` of each, on a GPU the largest stage first, on a CPU, where that takes minutes, the smallest; training
        last. ``absent`` once for who cannot be had; ``skipped`` for what no time was left for.
    """
    opponents, told, took = Opponents(config, weights, dtype, None), set[str](), 0.0
    stages = range(config.scheduler.num_stages)
    variants = tuple(dict.fromkeys((REFERENCE, *(name for name in names if name != TRAINING))))
    try:
        for stage in () if names == [TRAINING] else stages if device.type == "cpu" else reversed(stages):
            # From small to large, a stage takes longer than the one before it.
            if (began := time.perf_counter()) + (took if device.type == "cpu" else 0) > deadline:
                yield skipped(shape, f"stage {stage}", variants)
                continue
            records: list[Record] = []
            for batch in batches:
                problem = StageProblem(
                    config=config, stage=stage, batch=batch, steps=steps, solver="euler", dtype=dtype, device=device
                )
                records += measure_stage(shape, problem, opponents, variants)
            yield from with_slopes(records)
            took = time.perf_counter() - began
            for name, reason in opponents.absent.items():
                if name not in told:
                    told.add(name)
                    yield {"kind": "absent", "variant": name, "reason": reason}
    finally:
        opponents.close()
    del opponents
    if TRAINING in names and time.perf_counter() > deadline:
        yield skipped(shape, "training", [TRAINING])
    elif TRAINING in names:
        # As many of each stage, or the slope would be that of the stages that the larger batch happens to have.
        sizes = [batch * config.scheduler.num_stages for batch in batches]
        yield from with_slopes([measure_training(shape, config, weights, n, dtype, device) for n in sizes])


def measure_stage(shape: str, problem: StageProblem, opponents: Opponents, variants: Sequence[str]) -> Iterator[Record]:
    """The records of one stage and batch; see :func:`measure_memory`.

    A run's first time compiles and captures, and is what is checked; the peak is that of the second. It is beside what
    lay there before the first, so what a program keeps between its steps is in it.
    """
    truth = true_first_state(problem, opponents.weights, ends_of(problem))  # first, while there is room
    records: dict[str, Record] = {}
    checks: dict[str, Ran] = {}
    for name in variants:
        record = memory_head(shape, f"stage {problem.stage}", problem.batch, name, counted=False) | {"right": True}
        run = None
        try:
            run = opponents.runs(name, problem)
            if run is None:
                continue
            before = settle(problem.device)
            checks[name] = _on_host(run.run(keep_first=True))
            found = peak_of(run.run, problem.device, before, _pool(run))
            records[name] = record | memory_figures(opponents.size(name), **found)
        except Exception as error:  # the others are measured all the same
            records[name] = record | {"right": False, "fault": first_line(error)}
            checks.pop(name, None)
        finally:
            if run is not None:
                run.close()
    for name, faults in stage_faults(problem, checks, (truth[0].cpu(), truth[1])).items():
        if faults:
            head = {key: value for key, value in records[name].items() if not key.endswith("_bytes")}
            records[name] = head | {"right": False, "fault": "; ".join(faults)}
    yield from records.values()


def _on_host(ran: Ran) -> Ran:
    """The same where it takes no room on the device."""
    return replace(ran, first=None if ran.first is None else ran.first.cpu(), end=ran.end.cpu())


def _pool(run: object) -> Pool | None:
    """What a run's graphs share; None without graphs. It is there after the first run."""
    capture = run.store.capture if isinstance(run, EngineRun) else None
    return capture.pool if isinstance(capture, CudaCapture) else None


def measure_training(
    shape: str,
    config: PixelFlowConfig,
    weights: Mapping[str, Tensor],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Record:
    """A forward and backward pass by plain PyTorch, the images spread over all stages."""
    record = memory_head(shape, "training", batch, TRAINING, counted=False) | {"right": True}
    try:
        step = training_step(config, weights, batch, dtype, device)
        before = settle(device)
        if fault := step.fault():
            return record | {"right": False, "fault": fault}
        found = peak_of(step.run, device, before, None)
        return record | memory_figures(size_of(step.model), **found, gradient_bytes=step.gradients)
    except Exception as error:
        return record | {"right": False, "fault": first_line(error)}
