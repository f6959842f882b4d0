"""Small reference models with random values in every parameter, also those initialized to zero; seeded generators."""

import torch
from torch import Tensor

from pixelflow_engine.reference import PixelFlowTransformer


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator; the seed is printed, so that a failing test shows it."""
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw standard normals."""
    return torch.randn(shape, generator=generator, dtype=dtype)


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw matrices of unit gain, norm weights around 1 and biases around 0: no value is 0 or 1, so no term is hidden.

    Values are rounded to float32, so that a float64 model and its float32 copy have equal weights.
    """
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() > 1:
            value = draw / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            value = 0.3 * draw
        else:
            value = 1 + 0.3 * draw
        parameter.copy_(value)


def random_reference(
    seed: int,
    *,
    heads: int = 2,
    head_dim: int = 8,
    depth: int = 2,
    patch_size: int = 2,
    num_classes: int = 5,
    attention_bias: bool = True,
    cross_attention_dim: int | None = None,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
) -> PixelFlowTransformer:
    """Return a reference model with random weights, in evaluation mode and without gradients."""
    model = PixelFlowTransformer(
        depth=depth,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch_size,
        num_classes=num_classes,
        attention_bias=attention_bias,
        cross_attention_dim=cross_attention_dim,
    )
    randomize(model, seeded(seed))
    return model.to(dtype).eval().requires_grad_(False)
