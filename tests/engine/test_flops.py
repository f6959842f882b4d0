"""Operations counted from shapes, beside PyTorch's own counter over the reference's passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixelflow_engine import ModelConfig
from pixelflow_engine.flops import Flops, count, peak_flops
from pixelflow_engine.reference import PixelFlowTransformer

MODEL = ModelConfig(num_attention_heads=3, attention_head_dim=8, depth=2, patch_size=2, num_classes=5)
GRIDS = [(6, 4), (3, 3), (1, 1), (3, 3)]
aten = torch.ops.aten


def counted(model: ModelConfig, backward: bool) -> int:
    """Of the reference, image by image."""
    names = ("depth", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size")
    reference = PixelFlowTransformer(
        **{name: getattr(model, name) for name in names}, num_classes=model.num_classes, attention_bias=True
    )
    on_cpu: Any = {  # the counter knows the attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    labels = torch.tensor([1]) if model.num_classes else None
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        for rows, columns in GRIDS:
            x = torch.randn(1, model.in_channels, rows * model.patch_size, columns * model.patch_size)
            loss = reference(x, torch.tensor([500.0]), labels).square().mean()
            if backward:
                loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "model",
    [MODEL, replace(MODEL, depth=3, in_channels=1, out_channels=1), replace(MODEL, patch_size=4, num_classes=0)],
    ids=["classes", "grey", "no classes"],
)
def test_operations_of_a_ragged_pack_are_those_that_pytorch_counts(model: ModelConfig) -> None:
    found = count(model, [rows * columns for rows, columns in GRIDS])
    assert found.forward == counted(model, backward=False)
    assert found.training == counted(model, backward=True)


def test_a_pack_costs_what_its_images_cost() -> None:
    alone = [count(MODEL, [length]) for length in (24, 9, 1)]
    whole = count(MODEL, [24, 9, 1])
    for kind in ("products", "first_products", "attention"):
        assert getattr(whole, kind) == sum(getattr(flops, kind) for flops in alone)
    assert count(MODEL, []) == Flops(0, 0, 0)


def test_text_is_refused_because_its_length_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"model\.cross_attention_dim: got 16, expected a model without text"):
        count(replace(MODEL, cross_attention_dim=16), [4])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # another chip
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of one
        ("Quadro RTX 6000", None),
        ("", None),
    ],
)
def test_a_peak_is_of_one_device_and_no_other(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
