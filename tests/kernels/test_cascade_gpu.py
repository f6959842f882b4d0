"""The cascade's compiled kernels on a device, all level A: the bits of the CPU, and of eager PyTorch on the device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.cascade import (
    initial_normals,
    kernels,
    op,
    reference,
    training_pairs,
    upsample_draw_renoise,
    upsample_renoise,
)
from pixelflow_kernels.philox import seed_tensor
from support import cascade
from support.cascade import ALPHA, BETA, SEEDS
from support.kernels import assert_filled, assert_same_bits, poisoned

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 5, 4, 2), (8, 3, 64, 64), (4, 3, 32, 48), (2, 3, 128, 128), (1, 3, 255, 257)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise_type", DTYPES)
def test_given_noise(shape: tuple[int, int, int, int], dtype: torch.dtype, noise_type: torch.dtype) -> None:
    x = cascade.states(shape, dtype, 3, "cuda")
    noise = cascade.states((*shape[:2], 2 * shape[2], 2 * shape[3]), noise_type, 4, "cuda")
    buffer, out = poisoned(*noise.shape, dtype=dtype, device="cuda", dense=True)
    kernels.launch_renoise(x, noise, None, out, 0, ALPHA, BETA)
    assert_filled(buffer, out)
    assert_same_bits(out, ALPHA * F.interpolate(x, scale_factor=2, mode="nearest") + BETA * noise.to(x))
    assert_same_bits(out.cpu(), reference.upsample_renoise(x.cpu(), noise.cpu(), ALPHA, BETA))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", [1, 3])
def test_drawn_noise(shape: tuple[int, int, int, int], dtype: torch.dtype, stage: int) -> None:
    x, seeds = cascade.states(shape, dtype, 5), seed_tensor(SEEDS[: shape[0]])
    want = op._renoise(x, None, seeds, stage, ALPHA, BETA)
    buffer, out = poisoned(*want.shape, dtype=dtype, device="cuda", dense=True)
    kernels.launch_renoise(x.cuda(), None, seeds.cuda(), out, stage, ALPHA, BETA)
    assert_filled(buffer, out)
    assert_same_bits(out.cpu(), want)
    # The same normals by torch's own operations on the device.
    blocks = reference.block_normals(seeds.cuda(), stage, (shape[1], 2 * shape[2], 2 * shape[3]))
    noise = reference.from_blocks(reference.correlate(blocks))
    assert_same_bits(out, reference.upsample_renoise(x.cuda(), noise, ALPHA, BETA))


def test_a_hundred_million_values() -> None:
    """Both kinds of noise; on the device the reference is quick."""
    x = cascade.states((16, 3, 512, 1024), torch.float32, 6, "cuda")
    seeds = torch.arange(16, dtype=torch.int64, device="cuda") << 58 | 12345
    noise = reference.from_blocks(reference.correlate(reference.block_normals(seeds, 2, (3, 1024, 2048))))
    want = reference.upsample_renoise(x, noise, ALPHA, BETA)
    assert want.numel() > 10**8
    assert_same_bits(upsample_draw_renoise(x, seeds, stage=2, alpha=ALPHA, beta=BETA), want)
    assert_same_bits(upsample_renoise(x, noise, alpha=ALPHA, beta=BETA), want)
    assert_same_bits(initial_normals(seeds, (3, 1023, 1025)), reference.initial_normals(seeds, (3, 1023, 1025)))


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 8, 8), (3, 32, 32), (4, 31, 33)])
def test_normals_of_the_first_stage(shape: tuple[int, int, int]) -> None:
    seeds = seed_tensor(SEEDS)
    buffer, out = poisoned(len(SEEDS), *shape, device="cuda", dense=True)
    kernels.launch_initial(seeds.cuda(), out)
    assert_filled(buffer, out)
    assert_same_bits(out.cpu(), reference.initial_normals(seeds, shape))


PACKS = [
    {"stages": 4, "patch_size": 4, "channels": 3, "smallest": (8, 8), "halvings": [0, 0, 1, 1, 2, 2, 3, 3]},
    {"stages": 4, "patch_size": 4, "channels": 3, "smallest": (3, 5), "halvings": [0, 3, 1, 0, 2], "strided": True},
    {"stages": 1, "patch_size": 2, "channels": 4, "smallest": (9, 7), "halvings": [0, 0, 0]},
    {"stages": 3, "patch_size": 1, "channels": 1, "smallest": (2, 3), "halvings": [2, 0, 1, 0]},
    {"stages": 3, "patch_size": 3, "channels": 5, "smallest": (2, 1), "halvings": [0, 1, 2], "strided": True},
    {"stages": 6, "patch_size": 2, "channels": 1, "smallest": (1, 2), "halvings": [5, 0, 3, 4]},
    {"stages": 2, "patch_size": 4, "channels": 3, "smallest": (1, 1), "halvings": []},
]


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: f"s{pack['stages']}p{pack['patch_size']}")
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("draw", [True, False])
@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs(pack: dict, uint8: bool, draw: bool, flips: bool, token_dtype: torch.dtype) -> None:
    made = cascade.make_pack(seed=7, uint8=uint8, draw=draw, flips=flips, **pack)
    on_device = made.to("cuda")
    tokens, targets = cascade.launched(on_device, token_dtype)
    for want in (
        reference.training_pairs(*made.arguments(), made.patch_size),
        reference.training_pairs(*on_device.arguments(), made.patch_size),  # eager PyTorch on the device
    ):
        assert_same_bits(tokens.cpu(), want[0].to(token_dtype).cpu(), "tokens")
        assert_same_bits(targets.cpu(), want[1].cpu(), "targets")
    again = training_pairs(on_device.images, on_device.layout, **on_device.keywords(), token_dtype=token_dtype)
    assert_same_bits(again[0], tokens)
    assert_same_bits(again[1], targets)


def test_special_values_in_images() -> None:
    made = cascade.make_pack(seed=2, uint8=False, **PACKS[0])
    for values in (cascade.states(made.images.shape, torch.float32, 3), cascade.specials(made.images.shape, 5)):
        made.images.copy_(values)
        tokens, targets = cascade.launched(made.to("cuda"), torch.float32)
        want_tokens, want_targets = reference.training_pairs(*made.arguments(), made.patch_size)
        assert_same_bits(tokens.cpu(), want_tokens, "tokens")
        assert_same_bits(targets.cpu(), want_targets, "targets")


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 1, 256, 256), (3, 4, 12, 20), (2, 3, 512, 512)])
def test_halving_rounds_as_torch_does_here(shape: tuple[int, int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    assert_same_bits(reference.halve(x), F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False))


def test_an_image_that_does_not_exist_becomes_nan() -> None:
    pack = cascade.make_pack(seed=5, stages=2, patch_size=2, channels=3, smallest=(1, 2), halvings=[0, 1, 0, 1])
    want = reference.training_pairs(*pack.arguments(), 2)
    pack.index[1], pack.index[2] = 2, -1
    for got, expected in zip(cascade.launched(pack.to("cuda"), torch.float32), want, strict=True):
        assert got[8:18].isnan().all()
        assert_same_bits(got[:8].cpu(), expected[:8])
        assert_same_bits(got[18:].cpu(), expected[18:])


def test_inside_a_graph() -> None:
    """Captured and replayed with other seeds: nothing waits for the device or is decided by its data."""
    x = cascade.states((4, 3, 64, 64), torch.float32, 1, "cuda")
    seeds = torch.arange(4, device="cuda")
    pack = cascade.make_pack(seed=3, draw=True, **PACKS[0]).to("cuda")
    layout: PackedLayout = pack.layout

    def everything() -> tuple[torch.Tensor, ...]:
        entered = upsample_draw_renoise(x, seeds, stage=1, alpha=ALPHA, beta=BETA)
        pairs = training_pairs(pack.images, layout, **pack.keywords())
        return initial_normals(seeds, (3, 32, 32)), entered, *pairs

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    seeds.add_(2**40)
    pack.tau.mul_(0.5)
    pack.images.bitwise_xor_(0x55)
    graph.replay()
    for got, want in zip(captured, everything(), strict=True):
        assert_same_bits(got, want)
