"""Variants of ``bench coldstart``: the engines that make a first image, their checkpoint and the check of the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixelflow_benchmarks.opponents.random_models import SHAPES, random_reference, random_weights
from pixelflow_benchmarks.suites.images.measure import wrong
from pixelflow_benchmarks.suites.images.opponents import EXACT, REFERENCE, SEED, ImageProblem, reference_images
from pixelflow_engine import Checkpoint, load_checkpoint, save_checkpoint
from pixelflow_engine.noise import CounterNoise

EMPTY, FILLED = ", empty cache", ", filled cache"
COMMAND = "command line"
BUNDLED = "digits"
"""Name of the bundled model, accepted where a shape is expected."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine that is started in a new process.

    Attributes:
        name: name of the engine; where a compiler runs, followed by the state of its cache.
        backend, compile, graphs: settings of the engine.
    """

    name: str
    backend: str
    compile: bool = False
    graphs: bool = False

    @property
    def cache(self) -> Literal["empty", "filled"] | None:
        """State of the compilers' cache at the start; None where no compiler runs."""
        return "empty" if self.name.endswith(EMPTY) else "filled" if self.name.endswith(FILLED) else None

    @property
    def engine(self) -> str:
        """Name without the state of the cache: variants of one engine share a cache."""
        return self.name.removesuffix(EMPTY).removesuffix(FILLED)


def _both(engine: str, backend: str, compile: bool, graphs: bool) -> tuple[Variant, Variant]:
    empty, filled = (Variant(engine + cache, backend, compile, graphs) for cache in (EMPTY, FILLED))
    return empty, filled


TORCH = Variant("torch", "torch")
ON_CPU = (TORCH, *_both("torch, compiled", "torch", True, False))
ON_GPU = (
    *_both("triton, graphs", "triton", False, True),
    TORCH,
    *_both("triton, compiled, graphs", "triton", True, True),
    *_both("triton", "triton", False, False),
    *_both("torch, compiled", "torch", True, False),
)
"""Most important first; the variant with an empty cache comes before the one with the filled cache."""

VARIANTS = {variant.name: variant for variant in (*ON_GPU, *ON_CPU)}


def in_order(names: Iterable[str]) -> list[Variant]:
    """Return variants in the order in which they run: the one that fills a cache, added if need be, before its user."""
    found: dict[str, Variant] = {}
    for name in names:
        variant = VARIANTS[name]
        if variant.cache == "filled":
            found.setdefault(variant.engine + EMPTY, VARIANTS[variant.engine + EMPTY])
        found.setdefault(name, variant)
    return list(found.values())


def checkpoint_of(shape: str, folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Return the bundled model, or a model of the given shape with random weights, saved in ``folder`` in float32.

    Args:
        shape: ``digits``, or one of the benchmarks' shapes.
        folder: a new folder.
        dtype: type in which the random weights are exact.
    """
    if shape == BUNDLED:
        return load_checkpoint(BUNDLED)
    config = SHAPES[shape]
    weights = random_weights(config, torch.device("cpu"), dtype)
    save_checkpoint(folder, config, weights)
    return Checkpoint(config, weights, str(folder))


def checker(
    checkpoint: Checkpoint, steps: int, dtype: torch.dtype, device: torch.device
) -> Callable[[str, Tensor], str | None]:
    """Return a function that checks a variant's image by the rule of the images suite.

    In float32 on a CPU the plain engine must have the reference's bits. All others may be twice as far from float64 as
    the reference, plus two float32 roundings, see :func:`~pixelflow_benchmarks.suites.images.measure.wrong`.

    Args:
        checkpoint: the model.
        steps: Euler steps per stage.
        dtype: type of the matrix products.
        device: device on which the images are made.
    """
    problem = ImageProblem(config=checkpoint.config, batch=1, steps=steps, dtype=dtype, device=device)
    weights: Mapping[str, Tensor] = {name: w.to(device) for name, w in checkpoint.state_dict.items()}

    def made_by_reference(of: torch.dtype | None) -> Tensor:
        model = random_reference(problem.config, weights, of or torch.float32)
        return reference_images(model, problem, CounterNoise((SEED,), device), of).cpu()

    expected, truth = made_by_reference(None), made_by_reference(torch.float64)

    def fault(name: str, image: Tensor) -> str | None:
        if not bool(image.isfinite().all()):
            return "not finite"
        exact = name == TORCH.name and device.type == "cpu" and dtype == torch.float32
        shown = EXACT if exact else name
        return wrong({REFERENCE: expected, shown: image}, truth).get(shown)

    return fault
