"""Live bytes of one evaluation of a model on a CUDA device that need not exist, counted on fake tensors.

Only the last step of a stage is run. What is made beforehand for all steps of the stage is counted with it: static
tensors, the modulations of every step, and the casts of weights that autocast keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.tracing import OneAttention, autocasting, fake, fake_cuda, fake_parameters
from pixelflow_benchmarks.opponents.random_models import SHAPES, reference_without_weights
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.fusion import fuse
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import Operations, PlainOperations
from pixelflow_engine.packed_stages import PackedStages, ProgramStore
from pixelflow_engine.plain_stages import PlainStages
from pixelflow_engine.plan import Condition, SamplingPlan, StagePlan
from pixelflow_engine.reference.sampler import guided_velocity
from pixelflow_engine.reference.solvers import euler_step
from pixelflow_engine.schedule import make_stages
from pixelflow_engine.solvers import Tolerance
from pixelflow_engine.stages import Stages

from .live import LiveBytes
from .records import memory_figures, memory_head, size_of, skipped, with_slopes

FUSED, PLAIN, REFERENCE = "engine, fused", "engine, plain", "reference, bf16 autocast"
VARIANTS = (FUSED, PLAIN, REFERENCE)
STEPS = 10
"""Euler steps of a stage, the default of a call; the engine keeps the modulations of all of them."""

CUDA = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes of an evaluation.

    Attributes:
        weights: bytes of the weights, which exist beforehand; concatenated if the variant does that.
        activations: peak of the live bytes in addition to the weights.
    """

    weights: int
    activations: int


def count_memory(
    shape: str, names: Sequence[str], batches: Sequence[int], deadline: float = math.inf
) -> Iterator[Record]:
    """Count variants at every stage and batch size.

    Args:
        shape: shape of the model; weights and products are bf16, the reference's weights float32.
        names: names of variants.
        batches: numbers of images; with guidance the model sees twice as many sequences.
        deadline: time after which no stage is begun, on the clock of ``time.perf_counter``.

    Yields:
        A ``memory`` record of each, marked ``counted``, the largest stage first; ``skipped`` for a stage that there was
        no time left for.
    """
    config = SHAPES[shape]
    for stage in reversed(range(config.scheduler.num_stages)):
        if time.perf_counter() > deadline:
            yield skipped(shape, f"stage {stage}", names)
            continue
        records = []
        for name in names:
            for batch in batches:
                problem = StageProblem(
                    config=config,
                    stage=stage,
                    batch=batch,
                    steps=STEPS,
                    solver="euler",
                    dtype=torch.bfloat16,
                    device=CUDA,
                )
                found = count(name, problem)
                head = memory_head(shape, f"stage {stage}", batch, name, counted=True)
                records.append(head | memory_figures(found.weights, found.activations))
        yield from with_slopes(records)


def count(name: str, problem: StageProblem) -> Counted:
    """Count the last step of a stage by one of :data:`VARIANTS`."""
    if name == REFERENCE:
        return _count_reference(problem)
    operations: Operations = FusedOperations("triton") if name == FUSED else PlainOperations()
    with torch.device("meta"):
        model = PackedTransformer(problem.config.model, operations)
    model.in_halves = True  # as an engine runs them
    with fake_cuda():
        fake_parameters(model, problem.dtype)
        if name == FUSED:
            fuse(model)
        return Counted(size_of(model), _watched(_engine_step(model, problem, packed=name == FUSED)))


def _engine_step(model: PackedTransformer, problem: StageProblem, packed: bool) -> Callable[[], object]:
    plan = StagePlan(
        stage=make_stages(problem.config.scheduler)[problem.stage],
        shapes=(problem.shape,),
        weights=(problem.weight,) * problem.batch,
        num_steps=problem.steps,
        first_step=problem.steps - 1,
    )
    sampling = SamplingPlan(stages=(plan,), solver="euler", shift=1.0, state="fp32", tolerance=Tolerance())
    x, condition = _state(problem), Condition(class_labels=_labels(problem))

    def step() -> object:
        stages: Stages
        if packed:
            stages = PackedStages(model, problem.config, sampling, condition, ProgramStore(None))
        else:
            stages = PlainStages(model, problem.config, sampling, condition)
        return stages.run([x], plan, lambda step, tau, states: None)

    return step


def _count_reference(problem: StageProblem) -> Counted:
    model = reference_without_weights(problem.config)
    with fake_cuda():
        weights = fake_parameters(model, torch.float32)
        x, labels = _state(problem), _labels(problem)

        def step() -> Tensor:
            times = fake((problem.batch,), torch.float32)
            v = guided_velocity(model, x, times, problem.weight, labels, None, None, torch.float32)
            return euler_step(x, v, torch.tensor(0.5), torch.tensor(0.75))

        return Counted(size_of(model), _watched(step, problem.dtype, weights))


def _watched(step: Callable[[], object], autocast: torch.dtype | None = None, weights: Iterable[Tensor] = ()) -> int:
    with OneAttention(), autocasting(autocast), LiveBytes("cuda", weights) as live:
        step()
    return live.peak


def _state(problem: StageProblem) -> Tensor:
    return fake(problem.shape, torch.float32)


def _labels(problem: StageProblem) -> Tensor:
    return fake((problem.batch,), torch.int64)
