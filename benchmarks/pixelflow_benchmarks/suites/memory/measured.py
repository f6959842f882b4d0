"""Measured peaks: stages of the model by every variant, and the forward and backward pass of a training step."""

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
    """Check every variant at every stage and batch size, and measure the peak of a run of those that are right.

    Args:
        shape: name of the model's shape.
        config: configuration of the model.
        weights: weights of all models, exact in ``dtype``.
        names: names of variants; the reference, which the others are checked against, is added unless only training is
            asked for.
        batches: numbers of images; with guidance the model sees twice as many sequences. A training step has this
            number of images of every stage.
        steps: Euler steps.
        dtype: type of the matrix products.
        device: device to run on.
        deadline: time after which no stage and no further batch is begun, on the clock of ``time.perf_counter``. A CPU
            also skips a stage that would end after it even if it took no longer than the stage before.

    Yields:
        A ``memory`` record of each. A GPU takes the largest stage first; a CPU, where that one takes minutes, the
        smallest. Training comes last. ``absent`` once for a variant that cannot run; ``skipped`` for what there was no
        time left for.
    """
    opponents, told, took = Opponents(config, weights, dtype, None), set[str](), 0.0
    stages = range(config.scheduler.num_stages)
    variants = tuple(dict.fromkeys((REFERENCE, *(name for name in names if name != TRAINING))))
    try:
        for stage in () if set(names) == {TRAINING} else stages if device.type == "cpu" else reversed(stages):
            # On a CPU stages run from small to large, so that each takes longer than the one before it.
            if (began := time.perf_counter()) + (took if device.type == "cpu" else 0) > deadline:
                yield skipped(shape, f"stage {stage}", variants)
                continue
            records: list[Record] = []
            for batch in batches:
                if records and time.perf_counter() > deadline:
                    yield skipped(shape, f"stage {stage}, batch {batch}", variants)
                    continue
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
        # Equally many of each stage, or the slope would depend on the stages that the larger batch happens to have.
        sizes = [batch * config.scheduler.num_stages for batch in batches]
        yield from with_slopes([measure_training(shape, config, weights, n, dtype, device) for n in sizes])


def measure_stage(shape: str, problem: StageProblem, opponents: Opponents, variants: Sequence[str]) -> Iterator[Record]:
    """Yield the records of one stage and batch size; see :func:`measure_memory`.

    The first run compiles and captures, and is checked; the peak is that of the second run. It is relative to what was
    allocated before the first run, so that it includes what a program keeps between runs.
    """
    truth = true_first_state(problem, opponents.weights, ends_of(problem))  # first, while there is memory for it
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
        except Exception as error:  # the other variants are still measured
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
    """Copy the states to the host, where they take no device memory."""
    return replace(ran, first=None if ran.first is None else ran.first.cpu(), end=ran.end.cpu())


def _pool(run: object) -> Pool | None:
    """Return the memory pool that a run's graphs share; None without graphs. It exists after the first run."""
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
    """Measure a forward and backward pass by plain PyTorch, with the images spread over all stages."""
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
