"""What the gate measures, without a GPU and without any absolute time.

These are the launches and bytes of a fused block on fake tensors, the machine code of a sample of kernels, and how many
times faster than the reference the engine is on a CPU, with both timed in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.environment import processor
from pixelflow_benchmarks.harness.timing import first_line, time_runs
from pixelflow_benchmarks.opponents.random_models import random_weights
from pixelflow_benchmarks.suites.blocks import KINDS, trace_engine_block
from pixelflow_benchmarks.suites.images.measure import wrong
from pixelflow_benchmarks.suites.images.opponents import EXACT, REFERENCE, Call, ImageOpponents, ImageProblem
from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES
from pixelflow_engine import ModelConfig, PixelFlowConfig, SchedulerConfig
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import Operations
from pixelflow_kernels import aot
from pixelflow_kernels.machine_code import Specimen

Counts = dict[str, dict[str, int]]
"""Counts by subject (a class of operations, or a kernel), then kind (launches, bytes, instructions, ...)."""

BATCH, STAGE = 16, 3
"""Number of images, and stage, of the traced block."""

ARCH = 90
SAMPLE = (
    "varlen_attention.forward-long/bf16/d72-aligned",
    "varlen_attention.backward_keys/bf16/d72-aligned",
    "varlen_attention.backward_queries/bf16/d72-aligned",
    "varlen_attention.backward_delta/bf16/d72",
    "modulate.forward.layer_norm_modulate/bf16/c1152",
    "modulate.forward.add_gated_layer_norm_modulate/bf16/c1152",
    "modulate.forward.add_gated_rms_norm_modulate/bf16/c1152",
    "modulate.backward.add_gated_rms_norm_modulate/bf16/c1152",
    "modulate.sum/fp32/c1152",
    "rope2d.forward/bf16/c1152-d72",
    "rope2d.backward/bf16/c1152-d72",
    "ode_step.euler/bf16/guided-dense",
    "ode_step.stage6/bf16/guided-dense",
    "ode_step.error/bf16/guided-dense",
    "cascade.renoise/fp32/w64",
    "cascade.renoise_given/fp32/w64",
    "cascade.pairs/u8-bf16/s4",
)
"""Kernels that a step of sampling or of training launches, at the published model's sizes."""

TURNS = 25
CPU_SHAPE = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=4, attention_head_dim=16, depth=2, patch_size=2, num_classes=10),
    scheduler=SchedulerConfig(num_stages=4),
    resolution=64,
)
"""Four stages of up to 1024 tokens: an image takes a tenth of a second, of which host overhead is a small part."""
COMPILED = "engine, compiled"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of one run of the gate.

    Attributes:
        versions: versions of Triton and ptxas, which determine the machine code.
        processor: processor on which the ratios were measured.
        block: launches and bytes of the engine's fused block, by class of operation.
        machine_code: counts of the sample's machine code, by specimen; empty if ``skipped`` is set.
        times: how many times faster than the reference, by variant: the spread over rounds.
        faults: what was not counted or timed because it is wrong, by name, with the reason.
        skipped: why nothing was compiled; None if the sample was compiled.
        arch: architecture for which the sample was compiled.
    """

    versions: Mapping[str, str]
    processor: str
    block: Counts
    machine_code: Counts
    times: Mapping[str, Mapping[str, float]]
    faults: Mapping[str, str] = field(default_factory=dict)
    skipped: str | None = None
    arch: int = ARCH


def count_block(operations: Operations | None = None) -> Counts:
    """Count launches and bytes of one block with guidance, by class of operation.

    Args:
        operations: implementation of the block's operations; by default the engine's fused kernels.
    """
    side = STAGE_SIDES[STAGE]
    ops = trace_engine_block(operations or FusedOperations("triton"), True, 2 * BATCH, side)
    return {
        kind: {
            "launches": sum(op.launches for op in ops if op.kind == kind),
            "bytes": sum(op.bytes_moved for op in ops if op.kind == kind),
        }
        for kind in KINDS
    }


def sample() -> list[Specimen]:
    """Return the specimens of :data:`SAMPLE`, in its order.

    Raises:
        ValueError: a name in :data:`SAMPLE` is not that of a specimen.
    """
    ops = dict.fromkeys(name.partition(".")[0] for name in SAMPLE)
    by_name = {specimen.name: specimen for op in ops for specimen in aot.specimens_of(op, ARCH)}
    if unknown := [name for name in SAMPLE if name not in by_name]:
        raise ValueError(f"sample: got {', '.join(unknown)}, expected names of specimens")
    return [by_name[name] for name in SAMPLE]


def compile_sample(specimens: Iterable[Specimen]) -> tuple[Counts, dict[str, str]]:
    """Compile specimens for sm_90.

    Returns:
        Counts of each specimen's machine code, and faults of those that do not compile. ``main_loop`` stands for
        attention's instructions per score: it is their numerator, and tile sizes do not change with the code.
    """
    counts: Counts = {}
    faults = {}
    for specimen in specimens:
        row = aot.examine(specimen, ARCH)
        if row.report is None:
            faults[specimen.name] = "; ".join(row.broken)
            continue
        counts[specimen.name] = {
            "instructions": row.report.instructions,
            **({} if row.report.main_loop is None else {"main_loop": row.report.main_loop.total()}),
            "registers": row.report.registers,
            "spills": row.report.spills,
            "narrow": row.report.narrow,
            "shared": row.report.shared,
        }
    return counts, faults


def compilers() -> dict[str, str]:
    """Return the versions of the compilers that determine the machine code."""
    found = aot.versions()
    return {name: found[name] for name in ("triton", "ptxas")}


def engine_ratios(turns: int = TURNS) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time whole cascades by the reference, the exact and the compiled engine; see :func:`ratios`.

    They run on one thread, so that the ratios do not depend on the number of cores.
    """
    import torch._dynamo

    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    opponents = ImageOpponents(CPU_SHAPE, random_weights(CPU_SHAPE, cpu), torch.float32, cpu)
    problem = ImageProblem(config=CPU_SHAPE, batch=1, steps=2, dtype=torch.float32, device=cpu)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            calls = {name: opponents.call(name, problem) for name in (REFERENCE, EXACT, COMPILED)}
            return ratios(calls, lambda: opponents.truth(problem), turns)
    finally:
        opponents.close()
        torch.set_num_threads(threads)


def ratios(
    calls: Mapping[str, Call], truth: Callable[[], Tensor], turns: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Measure how many times faster than the reference each call is, round by round; images are compared first.

    Args:
        calls: calls by name, the reference among them.
        truth: makes the images in float64.
        turns: number of rounds; every call runs once in each.

    Returns:
        The spread of each call's ratio, the reference's excepted, and the faults of calls that are wrong or failed.
    """
    images: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    for name, call in calls.items():
        try:
            images[name] = call()
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            faults[name] = first_line(error)
    faults |= wrong(images, truth())
    timed = time_runs({name: calls[name] for name in images if name not in faults}, torch.device("cpu"), turns)
    faults |= timed.failed
    if (reference := timed.timings.get(REFERENCE)) is None:
        return {}, faults
    others = {name: timing for name, timing in timed.timings.items() if name != REFERENCE}
    return {name: timing.times_faster_than(reference) for name, timing in others.items()}, faults


def measure_gate(wanted: Mapping[str, str] | None) -> Measured:
    """Count, compile and time.

    Args:
        wanted: versions of the compilers that made the machine code to compare with; with any other version nothing is
            compiled. None accepts all versions.
    """
    versions = compilers()
    skipped = None
    if wanted is not None and wanted != versions:
        differing = {name: value for name, value in wanted.items() if versions.get(name) != value}
        skipped = ", ".join(f"{name} {versions.get(name, 'none')} instead of {was}" for name, was in differing.items())
    machine_code, faults = ({}, {}) if skipped else compile_sample(sample())
    times, wrong_images = engine_ratios()
    return Measured(
        versions=versions,
        processor=processor(),
        block=count_block(),
        machine_code=machine_code,
        times=times,
        faults=faults | {f"CPU, {name}": fault for name, fault in wrong_images.items()},
        skipped=skipped,
    )
