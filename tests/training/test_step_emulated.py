"""A training step on its kernels as compiled for sm_80 and sm_90, emulated: gradients level D, the update of AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import PlainOperations
from support.compiled import compiled_for, compiles, thorough, with_products
from support.recipes import tiny_recipe
from support.reference_models import random_reference
from support.steps import Watched, batch_of, random_state, step_of
from support.training_packs import assert_step, draw_pack, packed_model, packed_step, reference_step

pytestmark = compiles

GRIDS = [(3, 5), (8, 8), (2, 2), (2, 2), (1, 1), (5, 1), (1, 1)]
FORWARD = {"_modulate_forward_kernel", "_rope2d_forward_kernel", "_attention_forward_kernel"}
BACKWARD = {"_delta_kernel", "_backward_keys_kernel", "_backward_queries_kernel", "_modulate_backward_kernel"}
UPDATE = {"_squares_kernel", "_norm_kernel", "_numbers_kernel", "_update_kernel"}


@with_products
@pytest.mark.parametrize("text", [False, True], ids=["classes", "text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=thorough)], ids=str)
def test_losses_and_gradients(arch: int, dtype: torch.dtype, text: bool) -> None:
    """As close to the reference in float64, image by image, as the packed model on plain operations."""
    shape = {"num_classes": 0, "cross_attention_dim": 12} if text else {}
    reference = random_reference(10, heads=2, head_dim=72, depth=1, **shape).bfloat16().float()
    pack = draw_pack(reference, GRIDS, 11)
    plain = packed_step(packed_model(reference, PlainOperations(), dtype), pack)
    with compiled_for(arch) as gpu:
        found = packed_step(packed_model(reference, FusedOperations("triton"), dtype), pack)
    assert {*gpu.launched} > FORWARD | BACKWARD
    assert_step(found, plain, reference_step(reference, pack, torch.float64))


@with_products
def test_the_update_is_adamws(arch: int, tmp_path: Path) -> None:
    """Two steps in bfloat16: the weights, moments and averages of AdamW in float64 from the same gradients."""
    config = tiny_recipe(tmp_path, "compute.backend=triton", "compute.dtype=bfloat16", "optimizer.weight_decay=0.3")
    with compiled_for(arch) as gpu:
        state = random_state(config)
        step, watched = step_of(state, config, fused=True), Watched(state, config)
        for number in range(2):
            watched.step(step, batch_of(config, number), 1e-3)
    assert {*gpu.launched} > FORWARD | BACKWARD | UPDATE
    watched.check()
