"""The engine as a pipeline of diffusers, called like its ``DiTPipeline``: for programs that are written around those.

Usage::

    pip install diffusers
    python examples/diffusers_pipeline.py digits.png
"""

import sys

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from pixelflow_engine import PixelFlowEngine, StepEvent
from pixelflow_engine.image_files import write_images


class PixelFlowPipeline(DiffusionPipeline):
    """A pipeline around an engine.

    Args:
        engine: the engine, on its device; diffusers cannot load, save or move it.
    """

    def __init__(self, engine: PixelFlowEngine) -> None:
        super().__init__()
        self.register_modules(engine=engine)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 2.4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 10,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample an image for each label.

        Args:
            class_labels: class of each image.
            guidance_scale: largest guidance weight, that of the last stage.
            generator: one for the batch or one per image; an image's seed is drawn from it. None for fresh seeds.
            num_inference_steps: steps of each stage.
            output_type: ``pil``, ``np`` or ``pt``.
            return_dict: whether to return an ``ImagePipelineOutput`` or a tuple with the images.
        """
        with self.progress_bar(total=num_inference_steps * self.engine.config.scheduler.num_stages) as bar:

            def advance(event: StepEvent) -> None:
                bar.update()

            out = self.engine(
                class_labels,
                guidance_scale=guidance_scale,
                seed=seeds(generator, len(class_labels)),
                num_inference_steps=num_inference_steps,
                output_type=output_type,
                callback_on_step_end=advance,
            )
        return ImagePipelineOutput(images=out.images) if return_dict else (out.images,)


def seeds(generator: torch.Generator | list[torch.Generator] | None, images: int) -> list[int] | None:
    """Draw a seed per image, so that a generator that is used again gives other images."""
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return torch.randint(2**63 - 1, (images,), generator=generator, device=generator.device).tolist()
    if len(generator) != images:
        raise ValueError(f"generator: got {len(generator)} generators, expected one or one for each of {images} images")
    return [seed for one in generator for seed in seeds(one, 1)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pipeline = PixelFlowPipeline(PixelFlowEngine.from_pretrained("digits"))
    pictures = pipeline(list(range(10)), generator=torch.Generator().manual_seed(7), output_type="np").images
    write_images(pictures, sys.argv[1])
