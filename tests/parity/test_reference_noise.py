"""The reference noise: the law of a block, exactly and in samples, and the order of the published draws."""

import numpy as np
import pytest
import torch

from pixelflow_engine.reference import PublicNoise
from pixelflow_engine.reference.noise import block_covariance, correlate, from_blocks, to_blocks
from support.reference_models import normal, seeded

GAMMA = -1 / 3
COVARIANCE = (1 - GAMMA) * np.eye(4) + GAMMA * np.ones((4, 4)) + 1e-6 * np.eye(4)
U64, U32 = 2.0**-53, 2.0**-24


def test_block_covariance() -> None:
    covariance = block_covariance()
    assert covariance.shape == (4, 4)
    assert np.abs(covariance.numpy() - COVARIANCE).max() <= 2 * U32
    # Three equal eigenvalues 1 - g + 1e-6 for the deviations, 1 + 3g + 1e-6 = 1e-6 for the mean.
    assert np.abs(np.linalg.eigvalsh(COVARIANCE) - [1e-6, *[4 / 3 + 1e-6] * 3]).max() <= 8 * U64


def test_blocks_hold_their_pixels_in_row_major_order() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    blocks = to_blocks(images)
    assert blocks.shape == (2, 3, 2, 3, 4)
    for b in range(2):
        for c in range(3):
            for i in range(2):
                for j in range(3):
                    pixels = [images[b, c, 2 * i + di, 2 * j + dj] for di in (0, 1) for dj in (0, 1)]
                    assert blocks[b, c, i, j].tolist() == pixels
    assert torch.equal(from_blocks(blocks), images)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 6), (3, 1, 8, 2)])
def test_from_blocks_inverts_to_blocks(shape: tuple[int, int, int, int]) -> None:
    images = normal(shape, seeded(1))
    assert torch.equal(from_blocks(to_blocks(images)), images)
    blocks = to_blocks(images)
    assert torch.equal(to_blocks(from_blocks(blocks)), blocks)


def test_correlate_has_exactly_the_block_covariance() -> None:
    """A linear map A of independent normals has covariance ``A A^T``; A's columns are the images of unit vectors."""
    shape = (1, 2, 4, 6)
    n = 2 * 4 * 6
    units = torch.eye(n, dtype=torch.float64).reshape(n, *shape[1:])
    A = correlate(units).reshape(n, n).T.numpy()
    pixels = torch.arange(n).reshape(shape)
    order = to_blocks(pixels).flatten().numpy()  # pixels block by block
    expected = np.kron(np.eye(n // 4), COVARIANCE)
    # Entries of A are below 1.2 with a few roundings, four terms a product; blocks and channels are independent.
    assert np.abs((A @ A.T)[np.ix_(order, order)] - expected).max() <= 32 * U64
    outside = np.kron(np.eye(n // 4), np.ones((4, 4))) == 0
    assert not (A @ A.T)[np.ix_(order, order)][outside].any()


def test_correlate_is_linear_and_keeps_its_type() -> None:
    z = normal((2, 3, 4, 4), seeded(2), torch.float32)
    assert correlate(z).dtype == torch.float32
    assert torch.equal(correlate(-2 * z), -2 * correlate(z))  # a power of two and a sign round nothing
    # A constant block has no deviation: sqrt(1 + 3g + 1e-6) = 1e-3 of it is left.
    assert (correlate(torch.ones(1, 1, 2, 2)) - 1e-3).abs().max() <= 1e-3 * 4 * U32


def sample_covariance_is_right(blocks: np.ndarray) -> None:
    """Mean 0 and the block covariance, each entry within five standard errors of its estimate."""
    n = len(blocks)
    error = np.abs(blocks.T @ blocks / n - COVARIANCE)
    variances = np.diag(COVARIANCE)
    standard_error = np.sqrt((np.outer(variances, variances) + COVARIANCE**2) / n)
    assert (error <= 5 * standard_error).all(), error / standard_error
    assert (np.abs(blocks.mean(0)) <= 5 * np.sqrt(variances / n)).all()
    # The block's mean has variance 1e-6 / 4 where a wrong off-diagonal entry would give far more.
    assert abs(blocks.mean(1).std() / 5e-4 - 1) <= 5 / np.sqrt(2 * n) + 1e-3


def test_correlated_normals_have_the_block_covariance() -> None:
    z = normal((40, 3, 64, 64), seeded(3))
    sample_covariance_is_right(to_blocks(correlate(z)).reshape(-1, 4).numpy())


def test_public_noise_has_the_block_covariance() -> None:
    print("seed 4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        noise = PublicNoise().block(1, (4, 3, 64, 32))
    # In float32 the smallest pivot of the Cholesky factor, sqrt(4e-6), is known to 1e-7 / 4e-3 / 2e-3 = 1 per cent, and
    # the block's mean is a sum of four that cancel: its tiny variance cannot be asked for. Everything else can.
    blocks = to_blocks(noise).reshape(-1, 4).double().numpy()
    n = len(blocks)
    standard_error = np.sqrt((np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE)) + COVARIANCE**2) / n)
    assert (np.abs(blocks.T @ blocks / n - COVARIANCE) <= 5 * standard_error).all()
    assert blocks.mean(1).std() <= 1e-3


def test_public_noise_draws_block_by_block_from_the_global_generator() -> None:
    """Image, channel, block row, block column; four normals each, mapped by the Cholesky factor of the covariance."""
    shape = (2, 3, 4, 6)
    n = 2 * 3 * 4 * 6
    print("seed 5")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        noise = PublicNoise().block(3, shape)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        # A long contiguous draw would take another path through the generator than draws of four.
        z = torch.empty(2 * n)[::2].normal_().reshape(-1, 4)
        assert torch.equal(torch.get_rng_state(), state)
    assert noise.shape == shape
    assert noise.dtype == torch.float32
    single = z @ torch.linalg.cholesky(torch.tensor(COVARIANCE, dtype=torch.float32)).T
    double = z.double().numpy() @ np.linalg.cholesky(COVARIANCE).T
    i = 0
    for b in range(2):
        for c in range(3):
            for row in range(2):
                for column in range(3):
                    block = noise[b, c, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                    assert (block - single[i]).abs().max() <= 4 * 4 * 2 * U32  # sums of four terms below 4
                    # The last pivot is sqrt(4e-6) = 2e-3. Its square is what is left of an entry near 1, and a Cholesky
                    # factor of order n is one of a matrix whose entries are off by n + 1 roundings (Higham, theorem
                    # 10.3), after one of the covariance itself. Which of them happen is the processor's matter.
                    assert np.abs(block.numpy() - double[i]).max() <= 4 * (6 * U32) / (2 * 2e-3)  # times a normal
                    i += 1


def test_public_noise_starts_with_one_draw_and_repeats_with_the_seed() -> None:
    print("seed 6")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        first, block = PublicNoise().initial((2, 3, 4, 4)), PublicNoise().block(1, (2, 3, 8, 8))
        torch.manual_seed(6)
        assert torch.equal(torch.randn(2, 3, 4, 4), first)
        assert torch.equal(PublicNoise().block(1, (2, 3, 8, 8)), block)
        assert not torch.equal(PublicNoise().block(1, (2, 3, 8, 8)), block)
    assert first.dtype == torch.float32


def test_the_first_images_noise_does_not_depend_on_how_many_follow() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        alone = PublicNoise().block(1, (1, 3, 4, 4))
        torch.manual_seed(7)
        assert torch.equal(PublicNoise().block(1, (3, 3, 4, 4))[:1], alone)
