"""Models of given shapes with random weights: speed does not depend on values, and nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixelflow_engine import ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from pixelflow_engine.config import parameter_shapes
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.reference import PixelFlowTransformer

SHAPES = {
    "xl": PixelFlowConfig(
        model=ModelConfig(num_attention_heads=16, attention_head_dim=72, depth=28, num_classes=1000), resolution=256
    ),
    "cpu": PixelFlowConfig(
        model=ModelConfig(num_attention_heads=4, attention_head_dim=72, depth=4, num_classes=1000), resolution=256
    ),
    "small": PixelFlowConfig(
        model=ModelConfig(num_attention_heads=2, attention_head_dim=72, depth=4, num_classes=10),
        scheduler=SchedulerConfig(num_stages=3),
        resolution=32,
    ),
    "tiny": PixelFlowConfig(
        model=ModelConfig(num_attention_heads=2, attention_head_dim=8, depth=2, patch_size=2, num_classes=10),
        scheduler=SchedulerConfig(num_stages=2),
        resolution=16,
    ),
}
"""``xl`` is the published class-to-image model; ``cpu`` is a narrow model with the same token counts; ``small`` is of
the bundled model's shape, 32 pixels wide; ``tiny`` is for tests."""


def random_weights(
    config: PixelFlowConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Draw random weights under the published names, the same for one seed and kind of device.

    Matrices preserve the magnitude of their inputs and modulations are small, so that activations stay bounded at any
    depth.

    Args:
        config: configuration of the model.
        device: where the weights are drawn and stay.
        dtype: type that the values are rounded to; the tensors are float32.
        seed: seed of the draws.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config.model).items():
        draw = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 1 and name.endswith(("norm.weight", "norm2.weight", "norm3.weight")):
            value = 1 + 0.1 * draw
        elif len(shape) == 1:
            value = 0.1 * draw
        else:
            gain = 0.3 if "norm1.linear" in name or "proj_out_1" in name else 1.0
            value = gain * draw / draw[0].numel() ** 0.5
        weights[name] = value.to(dtype).float()
    return weights


def random_engine(
    config: PixelFlowConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    compile: bool = False,
    graphs: bool = False,
) -> PixelFlowEngine:
    """Return an engine with its own copy of the weights."""
    with torch.device("meta"):
        model = PackedTransformer(config.model)
    _load(model, weights, dtype)
    return PixelFlowEngine(config, model, backend, compile=compile, graphs=graphs)


def random_reference(
    config: PixelFlowConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> PixelFlowTransformer:
    """Return the reference model with its own copy of the weights, without gradients."""
    model = reference_without_weights(config)
    _load(model, weights, dtype)
    return model.requires_grad_(False).eval()


def reference_without_weights(config: PixelFlowConfig) -> PixelFlowTransformer:
    """Return the reference model on the meta device."""
    names = (
        "depth", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
        "num_classes",
    )  # fmt: skip
    with torch.device("meta"):
        return PixelFlowTransformer(**{name: getattr(config.model, name) for name in names})


def compile_blocks(model: PixelFlowTransformer) -> None:
    """Apply torch.compile to the reference block by block, with one graph per shape."""
    for block in model.transformer_blocks:
        block.compile(dynamic=False)


def _load(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    model.load_state_dict({name: w.to(dtype, copy=True) for name, w in weights.items()}, strict=True, assign=True)
