"""Distance of each way of running a model from the same model in float64: velocities, and images at equal noise.

A velocity may be as far from float64 as level D allows: twice as far as the reference model in the same type, plus two
roundings.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_engine import BackendUnavailableError, Checkpoint, PixelFlowEngine, StepEvent
from pixelflow_engine.schedule import make_stages, step_times

Velocity = Callable[[Tensor, float], Tensor]
"""A velocity field: a function of images ``[B, c, h, w]`` float64 and a model time."""


@dataclass(frozen=True, eq=False, slots=True)
class Moment:
    """A state of the float64 run between two of its steps, and the velocity there.

    Attributes:
        stage: index of the stage.
        t_model: model time.
        last: whether this is the stage's last evaluation, at tau = 0.999. The noise that the velocity is read from has
            almost gone there, so rounding of the state is amplified a thousandfold. The step that follows is shorter
            by the same factor.
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
        """Name shown in tables."""
        return f"{self.dtype}, {self.backend}{', compiled' if self.compiled else ''}"


VARIANTS = tuple(
    Variant(dtype, backend, compiled)
    for dtype in ("float32", "bfloat16")
    for backend, compiled in (("torch", False), ("torch", True), ("triton", False), ("triton", True), ("flash", False))
)
INTERPRETED = (Variant("float32", "torch", False), Variant("float32", "triton", False))
"""Variants run under Triton's interpreter, which has no bfloat16: the kernels, and PyTorch for comparison."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest velocity errors, each divided by the largest true velocity of its batch.

    Attributes:
        usual: maximum over all moments except each stage's last evaluation.
        last: maximum over the last evaluations.
    """

    usual: float
    last: float

    def allowed(self, dtype: torch.dtype) -> Errors:
        """Return the errors that level D allows if these are the reference's in ``dtype``; an eps is two roundings."""
        two = torch.finfo(dtype).eps
        return Errors(2 * self.usual + two, 2 * self.last + two)

    def fault(self, allowed: Errors) -> str | None:
        """Return what is wrong, or None; NaN is wrong."""
        if self.usual <= allowed.usual and self.last <= allowed.last:
            return None
        found = f"velocity errors {self.usual:.1e} and, at tau 0.999, {self.last:.1e}"
        return f"{found}, allowed {allowed.usual:.1e} and {allowed.last:.1e}"


def measure_distance(
    checkpoint: Checkpoint, labels: Sequence[int], steps: int, device: torch.device, variants: Sequence[Variant]
) -> Iterator[dict[str, Any]]:
    """Run every variant on the same labels and seeds.

    Args:
        checkpoint: a class-conditional model.
        labels: class labels of the images; an image's index is its seed.
        steps: Euler steps per stage, with the default guidance.
        device: device to run on.
        variants: variants to run.

    Yields:
        A ``reference`` record for each dtype, with its errors ``velocity`` and ``velocity_last`` (see :class:`Errors`).
        A ``distance`` record for each variant, with the same errors, their bounds ``allowed`` and ``allowed_last``, the
        ``psnr`` of each image in dB, for values in [0, 1], and a ``fault`` where a bound is exceeded. An ``absent``
        record for a variant that cannot run.
    """
    truth = PixelFlowEngine.from_checkpoint(checkpoint, device, torch.float64, "torch")
    moments, pictures = _true_run(truth, labels, steps)
    allowed: dict[str, Errors] = {}
    for variant in variants:
        dtype = getattr(torch, variant.dtype)
        if variant.dtype not in allowed:
            of_reference = errors_of(_reference(checkpoint, device, dtype, labels), moments)
            allowed[variant.dtype] = of_reference.allowed(dtype)
            yield {
                "kind": "reference",
                "variant": f"{variant.dtype}, reference",
                "velocity": of_reference.usual,
                "velocity_last": of_reference.last,
            }
        try:
            engine = PixelFlowEngine.from_checkpoint(
                checkpoint, device, dtype, variant.backend, compile=variant.compiled
            )
        except BackendUnavailableError as error:
            yield {"kind": "absent", "variant": variant.name, "reason": str(error)}
            continue
        bound = allowed[variant.dtype]
        record: dict[str, Any] = {"kind": "distance", "variant": variant.name}
        record |= {"allowed": bound.usual, "allowed_last": bound.last}
        try:
            found = errors_of(partial(_velocity, engine, labels=labels), moments)
            record |= {"velocity": found.usual, "velocity_last": found.last}
            record["psnr"] = [_psnr(a, b) for a, b in zip(_images(engine, labels, steps), pictures, strict=True)]
            fault = found.fault(bound)
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            fault = first_line(error)
        finally:
            engine.close()
        yield record | ({"case": "distance", "fault": fault} if fault else {})


def errors_of(velocity: Velocity, moments: Sequence[Moment]) -> Errors:
    """Return the errors of a velocity field along the float64 run; NaN counts as infinite."""
    found = {False: 0.0, True: 0.0}
    for moment in moments:
        off = (velocity(moment.x, moment.t_model).double() - moment.velocity).abs().max()
        error = (off / moment.velocity.abs().max()).item()
        found[moment.last] = math.inf if math.isnan(error) else max(found[moment.last], error)
    return Errors(found[False], found[True])


def _reference(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, labels: Sequence[int]) -> Velocity:
    """Return the reference model's velocity field, with weights in ``dtype``."""
    weights = {name: tensor.to(device) for name, tensor in checkpoint.state_dict.items()}
    model = random_reference(checkpoint.config, weights, dtype)
    classes = torch.tensor(labels, device=device)

    @torch.no_grad()
    def velocity(x: Tensor, t_model: float) -> Tensor:
        return model(x.to(dtype), torch.full((len(x),), t_model, device=device), classes)

    return velocity


def _true_run(engine: PixelFlowEngine, labels: Sequence[int], steps: int) -> tuple[list[Moment], Tensor]:
    moments = []

    def keep(event: StepEvent) -> None:
        if event.step == steps - 1:
            return  # the end of the stage: no velocity is evaluated there
        assert isinstance(event.latents, Tensor)
        config = engine.config.scheduler
        _, times = step_times(make_stages(config)[event.stage], config, steps, shift=1.0)
        x, t = event.latents.clone(), float(times[event.step + 1])
        moments.append(Moment(event.stage, t, event.step == steps - 2, x, _velocity(engine, x, t, labels=labels)))

    return moments, _images(engine, labels, steps, callback_on_step_end=keep)


def _velocity(engine: PixelFlowEngine, x: Tensor, t_model: float, *, labels: Sequence[int]) -> Tensor:
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
    """A row per variant that ran, and per reference: its errors, the allowed ones, the worst and the median image."""
    rows = []
    for record in run.records:
        if record["kind"] not in ("reference", "distance"):
            continue
        psnr = sorted(record.get("psnr", []))
        rows.append(
            (
                record["variant"],
                *(_error(record, name) for name in ("velocity", "allowed", "velocity_last", "allowed_last")),
                *((f"{psnr[0]:.1f}", f"{psnr[len(psnr) // 2]:.1f}") if psnr else ("", "")),
                ("further than allowed" if "velocity" in record else "failed") if "fault" in record else "",
            )
        )
    head = run.environment
    where = head.get("gpu", head["machine"])
    how = ", kernels interpreted" if head.get("interpreted") else ""
    count = f"{head['images']} image{'s' if head['images'] > 1 else ''}"
    title = f"{head['model']}, {count}, Euler {head['steps']}; {where}{how}, torch {head['torch']}."
    header = (
        "variant",
        "velocity error",
        "allowed",
        "at tau 0.999",
        "allowed there",
        "worst PSNR, dB",
        "median PSNR, dB",
        "wrong",
    )
    return TextTable(title, header, tuple(rows))


def _error(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.1e}" if name in record else ""
