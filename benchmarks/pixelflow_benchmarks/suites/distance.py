"""How far each way of running a model is from the same model in float64: velocities, and images at equal noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_engine import BackendUnavailableError, Checkpoint, PixelFlowEngine, StepEvent
from pixelflow_engine.schedule import make_stages, step_times


@dataclass(frozen=True, eq=False, slots=True)
class Moment:
    """A state of the float64 run between two of its steps, and the velocity there.

    Attributes:
        stage: its index.
        t_model: the model time.
        last: a stage's last evaluation, at tau = 0.999: the noise that the velocity is read from has nearly gone, so
            rounding the state moves it a thousandfold. The step that follows is as much shorter.
        x, velocity: ``[B, c, h, w]`` float64.
    """

    stage: int
    t_model: float
    last: bool
    x: Tensor
    velocity: Tensor


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a model."""

    dtype: str
    backend: str
    compiled: bool

    @property
    def name(self) -> str:
        """As a table shows it."""
        return f"{self.dtype}, {self.backend}{', compiled' if self.compiled else ''}"


VARIANTS = tuple(
    Variant(dtype, backend, compiled)
    for dtype in ("float32", "bfloat16")
    for backend, compiled in (("torch", False), ("torch", True), ("triton", False), ("flash", False))
)


def measure_distance(
    checkpoint: Checkpoint, labels: Sequence[int], steps: int, device: torch.device, variants: Sequence[Variant]
) -> Iterator[dict[str, Any]]:
    """Run every variant on the same labels and seeds.

    Args:
        checkpoint: a class-conditional model.
        labels: of the images; the place is the seed.
        steps: Euler's, at each stage, with the default guidance.
        device: where to run.
        variants: what to run.

    Yields:
        records: ``velocity``: the largest error of a velocity over the largest true one of its batch, over all
        evaluations along the float64 run but each stage's last; ``velocity_last``: over those. ``psnr``: of each image
        in dB, for values in [0, 1]. ``absent`` for a variant that cannot run.
    """
    truth = PixelFlowEngine.from_checkpoint(checkpoint, device, torch.float64, "torch")
    moments, pictures = _true_run(truth, labels, steps)
    for variant in variants:
        record: dict[str, Any] = {"kind": "distance", "variant": variant.name}
        try:
            dtype = getattr(torch, variant.dtype)
            engine = PixelFlowEngine.from_checkpoint(
                checkpoint, device, dtype, variant.backend, compile=variant.compiled
            )
        except BackendUnavailableError as error:
            yield {"kind": "absent", "variant": variant.name, "reason": str(error)}
            continue
        errors = {False: 0.0, True: 0.0}
        for moment in moments:
            off = (_velocity(engine, moment.x, moment.t_model, labels) - moment.velocity).abs().max()
            errors[moment.last] = max(errors[moment.last], (off / moment.velocity.abs().max()).item())
        psnr = [_psnr(a, b) for a, b in zip(_images(engine, labels, steps), pictures, strict=True)]
        yield record | {"velocity": errors[False], "velocity_last": errors[True], "psnr": psnr}
        engine.close()


def _true_run(engine: PixelFlowEngine, labels: Sequence[int], steps: int) -> tuple[list[Moment], Tensor]:
    moments = []

    def keep(event: StepEvent) -> None:
        if event.step == steps - 1:
            return  # the stage's end: no velocity is taken there
        assert isinstance(event.latents, Tensor)
        config = engine.config.scheduler
        _, times = step_times(make_stages(config)[event.stage], config, steps, shift=1.0)
        x, t = event.latents.clone(), float(times[event.step + 1])
        moments.append(Moment(event.stage, t, event.step == steps - 2, x, _velocity(engine, x, t, labels)))

    return moments, _images(engine, labels, steps, callback_on_step_end=keep)


def _velocity(engine: PixelFlowEngine, x: Tensor, t_model: float, labels: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return engine.velocity(x, t_model, class_labels=list(labels))


def _images(engine: PixelFlowEngine, labels: Sequence[int], steps: int, **options: Any) -> Tensor:
    seeds = list(range(len(labels)))
    out = engine(list(labels), seed=seeds, num_inference_steps=steps, output_type="pt", **options).images
    assert isinstance(out, Tensor)
    return out.double()


def _psnr(image: Tensor, truth: Tensor) -> float:
    error = (image - truth).square().mean().item()
    return -10 * math.log10(max(error, sys.float_info.min))


def distance_table(run: Run) -> TextTable:
    """One row for each variant that ran: the worst velocity errors, the worst and the median image's PSNR."""
    rows = []
    for record in run.of_kind("distance"):
        psnr = sorted(record["psnr"])
        errors = (f"{record['velocity']:.1e}", f"{record['velocity_last']:.1e}")
        found = (*errors, f"{psnr[0]:.1f}", f"{psnr[len(psnr) // 2]:.1f}")
        rows.append((record["variant"], *found))
    head = run.environment
    where = head.get("gpu", head["machine"])
    title = f"{head['model']}, {head['images']} images, Euler {head['steps']}; {where}, torch {head['torch']}."
    return TextTable(
        title, ("variant", "velocity error", "at tau 0.999", "worst PSNR, dB", "median PSNR, dB"), tuple(rows)
    )
