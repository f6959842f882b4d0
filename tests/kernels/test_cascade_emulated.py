"""The cascade's compiled kernels, emulated: level A, no differing bit, special values and every type included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, note

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
from support.compiled import by_arch, compiled_for, compiles
from support.kernels import assert_filled, assert_same_bits, plain, poisoned
from support.packs import draws

pytestmark = [
    compiles,
    by_arch,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, about infinities put in on purpose
]

HALF, F32, F64 = torch.bfloat16, torch.float32, torch.float64
DTYPES = [HALF, torch.float16, F32, F64]
SMALL = {"BLOCK_R": 4, "BLOCK_C": 2, "num_warps": 1}


# --- entering a stage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "noise_type", "shape"),
    [
        *((dtype, dtype, (2, 3, 5, 7)) for dtype in DTYPES),
        (HALF, F64, (3, 5, 4, 2)),  # rounded to the type of the state by way of float32
        (HALF, F32, (1, 3, 2, 33)),
        (F32, HALF, (2, 3, 8, 64)),
    ],
)
def test_given_noise(arch: int, dtype: torch.dtype, noise_type: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    x = cascade.states(shape, dtype, 3)
    noise = cascade.states((*shape[:2], 2 * shape[2], 2 * shape[3]), noise_type, 4)
    buffer, out = poisoned(*noise.shape, dtype=dtype, dense=True)
    with compiled_for(arch) as gpu:
        kernels.launch_renoise(x, noise, None, out, 0, ALPHA, BETA)
    assert gpu.launched == {"_renoise_kernel": 1}
    assert_filled(buffer, out)
    assert_same_bits(out, reference.upsample_renoise(x, noise, ALPHA, BETA))


@pytest.mark.parametrize(
    ("dtype", "shape", "config"),
    [
        *((dtype, (2, 3, 5, 7), None) for dtype in DTYPES),
        (torch.float16, (3, 5, 4, 2), SMALL),
        (F64, (3, 5, 4, 2), SMALL),
    ],
)
def test_drawn_noise(
    arch: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    config: dict[str, int] | None,
) -> None:
    x, seeds = cascade.states(shape, dtype, 5), seed_tensor(SEEDS[-shape[0] :])
    buffer, out = poisoned(*shape[:2], 2 * shape[2], 2 * shape[3], dtype=dtype, dense=True)
    with compiled_for(arch) as gpu:
        kernels.launch_renoise(x, None, seeds, out, 3, ALPHA, BETA, config)
    assert gpu.launched == {"_renoise_kernel": 1}
    assert_filled(buffer, out)
    assert_same_bits(out, plain(op._renoise)(x, None, seeds, 3, ALPHA, BETA))


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 32, 32)])
def test_normals_of_the_first_stage(arch: int, shape: tuple[int, int, int]) -> None:
    seeds = seed_tensor(SEEDS[:3])
    buffer, out = poisoned(3, *shape, dense=True)
    with compiled_for(arch) as gpu:
        kernels.launch_initial(seeds, out)
    assert gpu.launched == {"_initial_kernel": 1}
    assert_filled(buffer, out)
    assert_same_bits(out, reference.initial_normals(seeds, shape))


def test_what_sampling_runs(arch: int) -> None:
    """The public functions, with operands that are not contiguous."""
    x = cascade.states((2, 3, 7, 5), HALF, 1).transpose(2, 3)
    noise = cascade.states((2, 3, 14, 10), HALF, 2).transpose(2, 3)
    seeds = torch.tensor([[1, 2], [3, 4]])[:, 0]
    with compiled_for(arch) as gpu:
        first = initial_normals(seeds, (3, 2, 3))
        entered = upsample_renoise(x, noise, alpha=ALPHA, beta=BETA)
        drawn = upsample_draw_renoise(x, seeds, stage=3, alpha=ALPHA, beta=BETA)
        initial_normals(seeds[:0], (3, 2, 3))
        upsample_draw_renoise(x[:0], seeds[:0], stage=3, alpha=ALPHA, beta=BETA)
    assert gpu.launched == {"_initial_kernel": 1, "_renoise_kernel": 2}
    assert_same_bits(first, plain(op._initial_normals)(seeds, 3, 2, 3))
    assert_same_bits(entered, plain(op._renoise)(x, noise, None, 0, ALPHA, BETA))
    assert_same_bits(drawn, plain(op._renoise)(x, None, seeds, 3, ALPHA, BETA))


# --- training pairs ----------------------------------------------------------------------------------------


def check(arch: int, pack: cascade.Pack, token_dtype: torch.dtype = F32, config: dict[str, int] | None = None) -> None:
    with compiled_for(arch) as gpu:
        tokens, targets = cascade.launched(pack, token_dtype, config)
    assert gpu.launched == ({"_pair_kernel": 1} if pack.grids else {})
    want_tokens, want_targets = reference.training_pairs(*pack.arguments(), pack.patch_size)
    assert_same_bits(tokens, want_tokens.to(token_dtype), "tokens")
    assert_same_bits(targets, want_targets, "targets")


PACKS: dict[str, dict[str, Any]] = {
    "strided": {
        "stages": 3,
        "patch_size": 4,
        "channels": 3,
        "smallest": (2, 1),
        "halvings": [0, 1, 2],
        "strided": True,
    },
    "drawn": {"stages": 2, "patch_size": 4, "channels": 3, "smallest": (2, 1), "halvings": [0, 1, 0], "draw": True},
    "odd patch": {"stages": 2, "patch_size": 3, "channels": 2, "smallest": (1, 2), "halvings": [1, 0], "uint8": False},
    "one stage": {"stages": 1, "patch_size": 2, "channels": 4, "smallest": (9, 7), "halvings": [0, 0], "flips": False},
}


@pytest.mark.parametrize(
    ("name", "token_dtype"),
    [("strided", HALF), ("drawn", F32), ("odd patch", HALF), ("one stage", torch.float16)],
)
def test_pairs(arch: int, name: str, token_dtype: torch.dtype) -> None:
    """Of every type of tokens; images of bytes or float32, dense or with the channels innermost."""
    check(arch, cascade.make_pack(seed=7, **PACKS[name]), token_dtype)


def test_tiles_that_end_inside_an_image(arch: int) -> None:
    pack = cascade.make_pack(seed=9, stages=2, patch_size=4, channels=3, smallest=(1, 2), halvings=[0, 1, 0])
    check(arch, pack, HALF, {"BLOCK": 64, "num_warps": 1})


def test_special_values_in_images(arch: int) -> None:
    pack = cascade.make_pack(
        seed=2, stages=2, patch_size=4, channels=3, smallest=(2, 3), halvings=[0, 1, 0], uint8=False
    )
    assert pack.noise is not None
    pack.images.copy_(cascade.specials(pack.images.shape, 5))
    check(arch, pack, HALF)
    pack.images.copy_(cascade.states(pack.images.shape, F32, 3))
    pack.noise.copy_(cascade.states(pack.noise.shape, F32, 4))
    check(arch, pack, HALF)


@draws(2)
@given(pack=cascade.pair_packs(max_samples=3))
def test_ragged_packs(arch: int, pack: cascade.Pack) -> None:
    note(f"{tuple(pack.images.shape)} {pack.images.dtype}, grids {pack.grids}, patch {pack.patch_size}")
    check(arch, pack, HALF, {"BLOCK": 1024, "num_warps": 2})


def test_an_image_that_does_not_exist_becomes_nan(arch: int) -> None:
    """Nothing outside of the images is read for it; by the public function."""
    pack = cascade.make_pack(seed=5, stages=2, patch_size=2, channels=3, smallest=(1, 2), halvings=[0, 1, 0, 1])
    want = reference.training_pairs(*pack.arguments(), 2)
    pack.index[1], pack.index[2] = 2, -1
    with compiled_for(arch) as gpu:
        pairs = training_pairs(pack.images, pack.layout, **pack.keywords())
    assert gpu.launched == {"_pair_kernel": 1}
    for got, expected in zip(pairs, want, strict=True):
        assert got[8:18].isnan().all()
        assert_same_bits(got[:8], expected[:8])
        assert_same_bits(got[18:], expected[18:])
