"""The cascade's kernels under Triton's interpreter: level A, no differing bit, special values included.

Outputs lie in the middle of poison. The interpreter costs by the operation, not by the element, so tiles are large
where many values are wanted, and small where edges are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note
from torch import Tensor

from pixelflow_kernels.cascade import kernels, op, reference
from pixelflow_kernels.philox import seed_tensor
from support import cascade
from support.cascade import ALPHA, BETA, SEEDS
from support.kernels import assert_filled, assert_same_bits, assert_untouched, plain, poisoned, same_bits
from support.packs import draws

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, about infinities put in on purpose
]

SMALL = {"BLOCK_R": 4, "BLOCK_C": 2}
LARGE = {"BLOCK_R": 512, "BLOCK_C": 256}


def renoised(
    x: Tensor, noise: Tensor | None, seeds: Tensor | None, stage: int = 2, config: dict[str, int] | None = None
) -> Tensor:
    """By the kernel, into the middle of poison."""
    batch, channels, height, width = x.shape
    buffer, out = poisoned(batch, channels, 2 * height, 2 * width, dtype=x.dtype, dense=True)
    kernels.launch_renoise(x, noise, seeds, out, stage, ALPHA, BETA, config)
    assert_filled(buffer, out)
    return out


# --- entering a stage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 5, 4, 2), (1, 3, 2, 33)])
@pytest.mark.parametrize("config", [SMALL, None], ids=["small tiles", "shipped tiles"])
def test_given_noise(shape: tuple[int, int, int, int], dtype: torch.dtype, config: dict[str, int] | None) -> None:
    x = cascade.states(shape, dtype, 3)
    for noise_type in (torch.float32, dtype):
        noise = cascade.states((*shape[:2], 2 * shape[2], 2 * shape[3]), noise_type, 4)
        out = renoised(x, noise, None, config=config)
        if dtype != torch.float16:  # whose every step is rounded from float32
            assert_same_bits(out, cascade.renoised_bits(x, noise, ALPHA, BETA))
        assert_same_bits(out, reference.upsample_renoise(x, noise, ALPHA, BETA))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 5, 4, 2)])
@pytest.mark.parametrize("stage", [1, 3])
def test_drawn_noise(shape: tuple[int, int, int, int], dtype: torch.dtype, stage: int) -> None:
    x, seeds = cascade.states(shape, dtype, 5), seed_tensor(SEEDS[-shape[0] :])
    want = plain(op._renoise)(x, None, seeds, stage, ALPHA, BETA)
    assert_same_bits(renoised(x, None, seeds, stage, {"BLOCK_R": 16, "BLOCK_C": 4}), want)


def test_ten_million_values_of_given_noise() -> None:
    shape = (2, 3, 700, 1201)
    x = cascade.states(shape, torch.float32, 6)
    noise = cascade.states((2, 3, 1400, 2402), torch.float32, 7)
    out = renoised(x, noise, None, config=LARGE)
    assert out.numel() > 2 * 10**7
    assert_same_bits(out, reference.upsample_renoise(x, noise, ALPHA, BETA))


def test_ten_million_values_of_drawn_noise() -> None:
    """And what they are like: mean, variance and covariance of a block."""
    shape, seeds = (2, 3, 650, 651), seed_tensor([2**64 - 1, 12])
    x = cascade.states(shape, torch.float32, 8)
    out = renoised(x, None, seeds, config=LARGE)
    assert out.numel() > 10**7
    assert_same_bits(out, plain(op._renoise)(x, None, seeds, 2, ALPHA, BETA))
    noise = renoised(torch.zeros(shape), None, seeds, config=LARGE) / np.float32(BETA)
    blocks = noise.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).reshape(-1, 4).double().numpy()
    n, want = len(blocks), cascade.covariance()
    assert np.abs(blocks.mean(0)).max() < 5 * math.sqrt(4 / 3 / n)
    # Standard error of a sample covariance: sqrt((S_ii S_jj + S_ij^2) / n) <= sqrt(2) * 4/3 / sqrt(n).
    assert np.abs(blocks.T @ blocks / n - want).max() < 5 * math.sqrt(2) * (4 / 3) / math.sqrt(n)
    beside = blocks[:-1, 1] * blocks[1:, 0]  # neighbours in two blocks
    assert abs(beside.mean()) < 5 * (4 / 3) / math.sqrt(n)


def test_ten_million_normals_of_the_first_stage() -> None:
    seeds = seed_tensor([2**63, 5])
    buffer, out = poisoned(2, 3, 1301, 1300, dense=True)
    kernels.launch_initial(seeds, out, {"BLOCK": 2**17})
    assert_filled(buffer, out)
    assert out.numel() > 10**7
    assert_same_bits(out, reference.initial_normals(seeds, (3, 1301, 1300)))
    z = out.double()
    assert abs(z.mean().item()) < 5 / math.sqrt(z.numel())
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / z.numel())
    assert abs(z.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / z.numel())


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 2, 2), (1, 1, 1), (2, 5, 9)])
def test_normals_of_the_first_stage(shape: tuple[int, int, int]) -> None:
    seeds = seed_tensor(SEEDS[:3])
    buffer, out = poisoned(3, *shape, dense=True)
    kernels.launch_initial(seeds, out, {"BLOCK": 8})
    assert_filled(buffer, out)
    assert_same_bits(out, reference.initial_normals(seeds, shape))


def test_an_empty_batch_starts_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    buffer, _ = poisoned(4, 4)
    kernels.launch_initial(none, buffer[:0])
    kernels.launch_renoise(torch.zeros(0, 3, 2, 2), None, none, buffer[:0], 1, ALPHA, BETA)
    assert_untouched(buffer)
    assert op._launch_initial_normals(none, 3, 2, 2).shape == (0, 3, 2, 2)
    pack = cascade.make_pack(seed=0, stages=2, patch_size=4, channels=3, smallest=(1, 1), halvings=[])
    for out in op._launch_training_pairs(*pack.arguments(), 0, 4, torch.float32, False):
        assert out.shape == (0, 48)


# --- training pairs ----------------------------------------------------------------------------------------


def check(pack: cascade.Pack, config: dict[str, int]) -> None:
    tokens, targets = cascade.launched(pack, torch.float32, config)
    want_tokens, want_targets = reference.training_pairs(*pack.arguments(), pack.patch_size)
    assert_same_bits(tokens, want_tokens, "tokens")
    assert_same_bits(targets, want_targets, "targets")


@draws(260)
@given(pack=cascade.pair_packs(drawn_noise=False))
def test_pairs_with_given_noise(pack: cascade.Pack) -> None:
    note(f"{tuple(pack.images.shape)} {pack.images.dtype}, grids {pack.grids}, patch {pack.patch_size}")
    check(pack, {"BLOCK": 4096})


@draws(40)
@given(pack=cascade.pair_packs(drawn_noise=True, max_samples=3))
def test_pairs_with_drawn_noise(pack: cascade.Pack) -> None:
    note(f"{tuple(pack.images.shape)} {pack.images.dtype}, grids {pack.grids}, patch {pack.patch_size}")
    check(pack, {"BLOCK": 4096})


@pytest.mark.parametrize("patch_size", [3, 4])
def test_tiles_that_end_inside_an_image(patch_size: int) -> None:
    pack = cascade.make_pack(
        seed=9, stages=3, patch_size=patch_size, channels=3, smallest=(1, 2), halvings=[0, 1, 2, 0], strided=True
    )
    check(pack, {"BLOCK": 256})
    check(pack, {"BLOCK": 1024})


@pytest.mark.parametrize("stages", [5, 6])
def test_deep_cascades(stages: int) -> None:
    halvings = [0, stages - 1, stages - 2, 1]
    pack = cascade.make_pack(seed=1, stages=stages, patch_size=2, channels=1, smallest=(1, 1), halvings=halvings)
    check(pack, {"BLOCK": 256})


def test_special_values_in_images() -> None:
    pack = cascade.make_pack(
        seed=2, stages=3, patch_size=4, channels=3, smallest=(2, 3), halvings=[0, 1, 2, 0, 2], uint8=False
    )
    pack.images.copy_(cascade.states(pack.images.shape, torch.float32, 3))
    check(pack, {"BLOCK": 2048})
    pack.images.copy_(cascade.specials(pack.images.shape, 5))
    check(pack, {"BLOCK": 2048})
    assert pack.noise is not None
    pack.noise.copy_(cascade.states(pack.noise.shape, torch.float32, 4))
    check(pack, {"BLOCK": 2048})


def test_ten_million_values_of_pairs() -> None:
    halvings = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    pack = cascade.make_pack(
        seed=3, stages=4, patch_size=4, channels=3, smallest=(15, 18), halvings=halvings, num_images=3
    )
    assert 2 * math.prod(pack.shape()) > 10**7
    check(pack, {"BLOCK": 2**19})


def test_an_image_that_does_not_exist_becomes_nan() -> None:
    pack = cascade.make_pack(seed=5, stages=2, patch_size=2, channels=3, smallest=(1, 2), halvings=[0, 1, 0, 1])
    want = reference.training_pairs(*pack.arguments(), 2)
    pack.index[1], pack.index[2] = 2, -1
    for got, expected in zip(cascade.launched(pack, torch.float32, {"BLOCK": 256}), want, strict=True):
        assert got[8:18].isnan().all()
        assert same_bits(got[:8], expected[:8])
        assert same_bits(got[18:], expected[18:])


@pytest.mark.parametrize("draw", [False, True])
def test_what_a_cuda_call_runs(draw: bool) -> None:
    """The CUDA implementations end to end: shipped tiles, operands that are not contiguous."""
    pack = cascade.make_pack(
        seed=6, stages=2, patch_size=4, channels=3, smallest=(2, 1), halvings=[0, 1], draw=draw, strided=True
    )
    assert pack.flip is not None
    pack.flip[:] = True
    values: list[Any] = [*pack.arguments()]
    for i in range(1, 8):
        if values[i] is not None:  # a mirror lies beside none: what is read in between must show
            between = ~values[i] if values[i].dtype == torch.bool else values[i]
            values[i] = torch.stack([values[i], between], -1)[..., 0]
    got = op._launch_training_pairs(*values, pack.shape()[0], 4, torch.float32, False)
    for a, b in zip(got, plain(op._training_pairs)(*values, pack.shape()[0], 4, torch.float32, False), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("draw", [False, True])
def test_what_a_cuda_call_of_renoise_runs(draw: bool) -> None:
    x = cascade.states((2, 3, 6, 4), torch.float32, 1).transpose(2, 3)
    noise = None if draw else cascade.states((2, 3, 12, 8), torch.float32, 2).transpose(2, 3)
    seeds = torch.tensor([[1, 2], [3, 4]])[:, 0] if draw else None
    arguments = (x, noise, seeds, 1, ALPHA, BETA)
    assert_same_bits(op._launch_renoise(*arguments), plain(op._renoise)(*arguments))
    seeds = torch.tensor([[1, 2], [3, 4]])[:, 0]
    assert_same_bits(op._launch_initial_normals(seeds, 3, 2, 3), plain(op._initial_normals)(seeds, 3, 2, 3))
