"""Variants that make images: the reference with and without the published noise loop, the engine, the published code.

All draw the same random stream, that of the published code, so that their images can be compared. It is drawn on the
CPU; on a GPU, a separate variant shows the engine with its own noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import compile_blocks, random_engine, random_reference
from pixelflow_benchmarks.suites.stages.problem import GUIDANCE, StageProblem
from pixelflow_engine import PixelFlowConfig, PixelFlowEngine
from pixelflow_engine.noise import PublicNoise as DrawnAtOnce
from pixelflow_engine.reference import PixelFlowTransformer, PublicNoise, guidance_weights, sample
from pixelflow_engine.reference.noise import NoiseSource

Call = Callable[[], Tensor]

SEED = 0

LOOP = "reference, noise block by block"
REFERENCE = "reference"
COMPILED_REFERENCE = "reference, compiled"
EXACT = "engine, exact"
ENGINES: dict[str, tuple[str, bool, bool]] = {
    EXACT: ("torch", False, False),
    "engine, compiled": ("torch", True, False),
    "engine, triton": ("triton", False, True),
    "engine, triton, compiled": ("triton", True, True),
    "engine, flash, compiled": ("flash", True, True),
}
"""Backend, whether blocks are compiled, and whether steps are replayed from CUDA graphs."""
PUBLIC = "published code"
OWN_NOISE = "engine, triton, compiled, its own noise"
ON_CPU = (LOOP, REFERENCE, EXACT, "engine, compiled", PUBLIC)
ON_GPU = (
    "engine, triton, compiled",
    REFERENCE,
    OWN_NOISE,
    PUBLIC,
    LOOP,
    "engine, triton",
    "engine, flash, compiled",
    COMPILED_REFERENCE,
    "engine, compiled",
)
"""Most important first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProblem:
    """A batch of images to make.

    Attributes:
        config: configuration of the model.
        batch: number of images; their class labels follow from their index.
        steps: Euler steps per stage.
        dtype: type of the matrix products.
        device: device to run on.
    """

    config: PixelFlowConfig
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device

    @property
    def case(self) -> str:
        """Name of the problem in records."""
        return f"batch {self.batch}, euler {self.steps}"

    @property
    def labels(self) -> Tensor:
        """Class labels ``[B]``, on the CPU."""
        return torch.arange(self.batch) * 7 % self.config.model.num_classes

    @property
    def stages(self) -> list[StageProblem]:
        """The stages that an image passes through."""
        return [
            StageProblem(
                config=self.config,
                stage=stage,
                batch=self.batch,
                steps=self.steps,
                solver="euler",
                dtype=self.dtype,
                device=self.device,
            )
            for stage in range(self.config.scheduler.num_stages)
        ]

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products and attention of all evaluations."""
        return self.steps * sum(stage.flops for stage in self.stages)

    @property
    def pointwise_bytes(self) -> int:
        """Bytes that the pointwise passes of all evaluations move."""
        return self.steps * sum(stage.pointwise_bytes for stage in self.stages)


class ImageOpponents:
    """Models of all variants, each made when it is first needed.

    Args:
        config: configuration of the model.
        weights: weights of all models, exact in ``dtype``.
        dtype: type of the matrix products.
        device: device to run on.
        public: a checkout of the published code.

    Attributes:
        absent: variants that cannot run, with the reason; they are not tried again.
    """

    def __init__(
        self,
        config: PixelFlowConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        public: Path | None = None,
    ) -> None:
        self.config, self.weights, self.dtype, self.device, self.public = config, weights, dtype, device, public
        self.absent: dict[str, str] = {}
        self._process: PublicProcess | None = None
        self._references: dict[bool, PixelFlowTransformer] = {}
        self._engines: dict[str, PixelFlowEngine] = {}

    def call(self, name: str, problem: ImageProblem) -> Call:
        """Return a function that makes the images, ``[B, c, H, W]`` in [0, 1].

        Raises:
            BackendUnavailableError: the variant's backend cannot run here.
            RuntimeError: the published code cannot be run.
            ValueError: no checkout of the published code was given.
        """
        if name == PUBLIC:
            return self._public(problem)
        if name == LOOP:
            return lambda: self._with_loop(problem)
        if name in (REFERENCE, COMPILED_REFERENCE):
            model = self._reference(compiled=name == COMPILED_REFERENCE)
            return lambda: reference_images(model, problem, drawn_at_once(problem.device))
        engine = self._engine("engine, triton, compiled" if name == OWN_NOISE else name)
        return lambda: engine_images(engine, problem, "counter" if name == OWN_NOISE else "public")

    def truth(self, problem: ImageProblem) -> Tensor:
        """Make the reference's images in float64, one by one: float64 attention materialises its logits."""
        model = random_reference(self.config, self.weights, torch.float64)
        noise = noise_of_stages(problem, drawn_at_once(problem.device))
        images = [
            reference_images(model, problem, NoiseOfOne(noise, image), torch.float64, problem.labels[image : image + 1])
            for image in range(problem.batch)
        ]
        return torch.cat(images)

    def close(self) -> None:
        """Release the engines' graphs and end the published code's process."""
        for engine in self._engines.values():
            engine.close()
        if self._process is not None:
            self._process.close()

    def _public(self, problem: ImageProblem) -> Call:
        if self.public is None:
            raise ValueError("public: no checkout of the published code was given")
        if self._process is not None and self._process.ended:  # what it could not do may be no trouble now
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = PublicProcess(self.public, self.config, self.dtype, self.device)
        return PublicImages(self._process, problem)

    def _with_loop(self, problem: ImageProblem) -> Tensor:
        torch.manual_seed(SEED)  # the published code draws from the global stream
        return reference_images(self._reference(compiled=False), problem, PublicNoise())

    def _reference(self, compiled: bool) -> PixelFlowTransformer:
        if compiled not in self._references:
            # Autocast caches its casts of weights only if they require gradients.
            model = random_reference(self.config, self.weights, torch.float32).requires_grad_(True)
            if compiled:
                compile_blocks(model)
            self._references[compiled] = model
        return self._references[compiled]

    def _engine(self, name: str) -> PixelFlowEngine:
        if name not in self._engines:
            backend, compiled, graphs = ENGINES[name]
            self._engines[name] = random_engine(
                self.config, self.weights, self.dtype, backend, compile=compiled, graphs=graphs
            )
        return self._engines[name]


class PublicImages:
    """The published code's pipeline, in its own process. Only the images of the first call are fetched and returned."""

    def __init__(self, process: PublicProcess, problem: ImageProblem) -> None:
        self._process = process
        self._request = {
            "do": "images",
            "labels": problem.labels.tolist(),
            "steps": problem.steps,
            "guidance": GUIDANCE,
            "seed": SEED,
        }
        self._images: Tensor | None = None

    def __call__(self) -> Tensor:
        """Make the images; later calls return those of the first."""
        file = Path(self._process.folder.name) / "images.pt"
        self._process.ask(self._request | {"keep": None if self._images is not None else str(file)})
        if self._images is None:
            self._images = torch.load(file, weights_only=True)
        return self._images


def drawn_at_once(device: torch.device) -> NoiseSource:
    """Return the published random stream, drawn without the published loop."""
    return DrawnAtOnce(torch.Generator().manual_seed(SEED), device)


def noise_of_stages(problem: ImageProblem, noise: NoiseSource) -> list[Tensor]:
    """Draw the noise of the whole batch for all stages, in the order in which the sampler asks for it."""
    channels, stages = problem.config.model.in_channels, problem.config.scheduler.num_stages
    sides = [problem.config.resolution >> stages - 1 - stage for stage in range(stages)]
    shapes = [(problem.batch, channels, side, side) for side in sides]
    return [noise.block(stage, shape) if stage else noise.initial(shape) for stage, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class NoiseOfOne:
    """One image's part of a batch's noise, a :class:`~pixelflow_engine.reference.noise.NoiseSource`.

    Attributes:
        whole: noise of the batch by stage, ``[B, c, h, w]`` each.
        image: index of the image in the batch.
    """

    whole: Sequence[Tensor]
    image: int

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        """Return the image's noise of the first stage."""
        return self.block(0, shape)

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        """Return the image's noise of a stage."""
        found = self.whole[stage][self.image : self.image + 1]
        assert found.shape == shape
        return found


@torch.no_grad()
def reference_images(
    model: PixelFlowTransformer,
    problem: ImageProblem,
    noise: NoiseSource,
    dtype: torch.dtype | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Make images ``[B, c, H, W]`` in [0, 1] by the reference's sampler.

    Matrix products run in the problem's type by autocast, unless ``dtype`` is given: then nothing is cast. ``labels``
    are those of the images to make, by default the problem's.
    """
    labels = problem.labels if labels is None else labels
    side, stages = problem.config.resolution, problem.config.scheduler.num_stages
    low = problem.dtype == torch.bfloat16 and dtype is None
    with torch.autocast(problem.device.type, torch.bfloat16, enabled=low):
        ends = sample(
            model,
            shape=(len(labels), problem.config.model.in_channels, side, side),
            num_stages=stages,
            num_inference_steps=[problem.steps] * stages,
            guidance=guidance_weights(GUIDANCE, stages),
            noise=noise,
            class_labels=labels.to(problem.device),
        )
    return (ends[-1] / 2 + 0.5).clamp(0, 1)


def engine_images(engine: PixelFlowEngine, problem: ImageProblem, noise: Literal["counter", "public"]) -> Tensor:
    """Make images ``[B, c, H, W]`` in [0, 1] by the engine's public call."""
    out = engine(
        problem.labels,
        num_inference_steps=problem.steps,
        guidance_scale=GUIDANCE,
        seed=SEED,
        noise=noise,
        output_type="pt",
    )
    assert isinstance(out.images, Tensor)
    return out.images
