"""Counter-based noise against published vectors and statistics; the public stream against a literal loop of draws."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pixelflow_engine import SchedulerConfig, noise, reference
from pixelflow_engine.noise import CounterNoise, PublicNoise
from pixelflow_engine.reference import noise as reference_noise
from pixelflow_engine.schedule import make_stages
from pixelflow_kernels import philox
from pixelflow_kernels.cascade import upsample_draw_renoise
from pixelflow_kernels.philox import box_muller, philox4x32, seed_tensor

CPU = torch.device("cpu")


def counter_normals(seeds: list[int], stage: int, count: int) -> Tensor:
    return philox.counter_normals(seed_tensor(seeds), stage, count)


# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    got = philox4x32(tuple(torch.tensor([c]) for c in counter), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(w) for w in got) == words


def test_box_muller_is_its_formula_in_float64() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**32, (2, 200_000))
    # The ends of both ranges and each quarter of the circle.
    words[:, :8] = [
        [0, 0xFFFFFFFF, 511, 512, 0, 0, 0, 0],
        [0, 0xFFFFFFFF, 2**30, 2**31, 3 * 2**30, 127, 128, 2**32 - 1],
    ]
    x, y = box_muller(*(torch.from_numpy(w) for w in words))
    u = (2 * (words[0] >> 9) + 1) * 2.0**-24
    offset = (2 * ((words[1] >> 7) & 0x7FFFFF) + 1) * 2.0**-24 - 0.5
    angle = (words[1] >> 30) * (math.pi / 2) + offset * (math.pi / 2)
    radius = np.sqrt(-2 * np.log(u))
    # log: 2 ulp; its root 1 + 1/2; sine or cosine: 2; the product: 1/2; the angle's own rounding: 1 ulp of pi/4.
    bound = 6 * 2.0**-24 * radius * 2
    assert (np.abs(x.double().numpy() - radius * np.cos(angle)) <= bound).all()
    assert (np.abs(y.double().numpy() - radius * np.sin(angle)) <= bound).all()
    assert x.dtype == y.dtype == torch.float32
    assert x.isfinite().all()
    assert y.isfinite().all()


def test_counter_normals_are_standard_and_independent() -> None:
    z = counter_normals([1, 2, 2**64 - 1], stage=2, count=40_000).double()
    for lane in range(4):
        assert stats.kstest(z[..., lane].flatten().numpy(), "norm").pvalue > 1e-3
    flat = z.reshape(3, -1)
    correlation = np.corrcoef(np.concatenate([z[0].T.numpy(), z[1].T.numpy(), z[2].T.numpy()]))
    assert np.abs(correlation - np.eye(12)).max() < 5 / math.sqrt(40_000)
    assert abs(flat.mean().item()) < 5 / math.sqrt(flat.numel())
    assert z.abs().max() < 5.77


def test_a_number_depends_on_seed_stage_and_position_alone() -> None:
    z = counter_normals([7, 9], stage=1, count=50)
    assert torch.equal(counter_normals([9], stage=1, count=20)[0], z[1, :20])
    assert not torch.equal(counter_normals([9], stage=2, count=20)[0], z[1, :20])
    # Both words of the seed are used.
    assert not torch.equal(counter_normals([7 + 2**32], stage=1, count=50)[0], z[0])
    alone, together = CounterNoise((9,), CPU), CounterNoise((7, 9, 7), CPU)
    assert torch.equal(alone.initial((1, 3, 6, 10))[0], together.initial((3, 3, 6, 10))[1])
    assert torch.equal(alone.block(1, (1, 3, 6, 10))[0], together.block(1, (3, 3, 6, 10))[1])
    same = together.block(1, (3, 3, 6, 10))
    assert torch.equal(same[0], same[2])


def test_odd_sizes_of_the_first_stage() -> None:
    x = CounterNoise((5,), CPU).initial((1, 1, 3, 3))
    assert torch.equal(x.flatten(), counter_normals([5], 0, 3).flatten()[:9])


def test_block_noise_of_counters_has_the_published_covariance() -> None:
    n = CounterNoise(tuple(range(40)), CPU).block(1, (40, 3, 32, 32))
    blocks = reference_noise.to_blocks(n).reshape(-1, 4).double()
    got = blocks.T @ blocks / len(blocks)
    want = reference_noise.block_covariance().double()
    # Standard error of a sample covariance: sqrt((S_ii S_jj + S_ij^2) / n) <= sqrt(2) * 4/3 / sqrt(n).
    assert (got - want).abs().max() < 5 * math.sqrt(2) * (4 / 3) / math.sqrt(len(blocks))


def test_entering_a_stage_has_the_bits_of_the_operation() -> None:
    """On a CPU it goes without, for the sake of what a first call imports."""
    x, seeds = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(2)), (5, 2**64 - 1)
    stage = make_stages(SchedulerConfig(num_stages=3))[2]
    got = CounterNoise(seeds, CPU).enter(x, stage)
    want = upsample_draw_renoise(x, seed_tensor(seeds), stage=2, alpha=stage.alpha, beta=stage.beta)
    assert torch.equal(got, want)


def test_correlate_equals_the_reference() -> None:
    z = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1))
    blocks = noise.from_blocks(noise.correlate(reference_noise.to_blocks(z)))
    assert torch.equal(blocks, reference_noise.correlate(z))


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 2), (1, 1, 4, 2), (2, 3, 8, 8), (3, 3, 16, 10), (2, 3, 64, 64), (1, 5, 2, 2)]
)
def test_the_public_stream_is_the_literal_loop_bit_for_bit(shape: tuple[int, int, int, int]) -> None:
    literal = reference.PublicNoise()
    torch.manual_seed(17)
    want = [literal.initial(shape), literal.block(1, shape), literal.block(2, shape)]
    state = torch.get_rng_state()

    fast = PublicNoise(None, CPU)
    torch.manual_seed(17)
    got = [fast.initial(shape), fast.block(1, shape), fast.block(2, shape)]
    assert torch.equal(torch.get_rng_state(), state)

    own = PublicNoise(torch.Generator().manual_seed(17), CPU)
    again = [own.initial(shape), own.block(1, shape), own.block(2, shape)]
    for a, b, c in zip(got, want, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state), "a generator of one's own leaves the global one alone"


def test_a_contiguous_draw_would_be_another_stream() -> None:
    torch.manual_seed(17)
    literal = reference.PublicNoise().block(1, (1, 3, 8, 8))
    torch.manual_seed(17)
    z = torch.randn(1, 3, 4, 4, 4)
    factor = torch.linalg.cholesky(reference_noise.block_covariance())
    assert not torch.allclose(reference_noise.from_blocks(z @ factor.T), literal)
