"""Public functions: validation and registration of the implementations.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``kernels`` and ``pairs``,
imported on first use because Triton is not installed everywhere). None is differentiable, because noise and training
data need no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.checks import check_device, check_dtype
from pixelflow_kernels.packing import PackedLayout
from pixelflow_kernels.philox import compiled_normals_at, normals_at
from pixelflow_kernels.registration import launched_by

from . import reference
from .law import MAX_STAGES

TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- public functions --------------------------------------------------------------------------------------


def initial_normals(seeds: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Draw the independent standard normals that a cascade starts from, each image's from its own seed.

    The bits are the same on every device and in any batch. Four neighbours in row-major order share a counter.

    Args:
        seeds: ``[B]`` int64; all 64 bits are used, so a seed of 2^63 or more is passed as the negative number with the
            same bits (see ``pixelflow_kernels.philox.seed_tensor``).
        shape: channels, height and width of an image.

    Returns:
        ``[B, c, h, w]`` float32.

    Raises:
        ValueError: a shape or dtype does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.4.
    """
    _check_seeds(seeds, None)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: got {tuple(shape)}, expected three positive integers (channels, height, width)")
    _check_size("shape", shape)
    return _initial_normals(seeds, *shape)


def upsample_renoise(x: Tensor, noise: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Enter a stage with given noise: ``alpha * upsample(x) + beta * noise``, upsampling by 2 with nearest neighbour.

    The result has the bits of eager PyTorch: in bf16 and fp16, each product and the sum are rounded to that dtype.

    Args:
        x: ``[B, c, h, w]`` bf16, fp16, fp32 or fp64.
        noise: ``[B, c, 2h, 2w]`` in any of these dtypes; first rounded to the dtype of ``x``.
        alpha, beta: coefficients of the stage.

    Returns:
        ``[B, c, 2h, 2w]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.4.
    """
    twice = _check_state(x)
    check_dtype("noise", noise.dtype)
    if tuple(noise.shape) != twice:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {twice}: that of x, twice as high and wide")
    check_device("noise", noise, "x", x)
    return _renoise(x, noise, None, 0, alpha, beta)


def upsample_draw_renoise(x: Tensor, seeds: Tensor, *, stage: int, alpha: float, beta: float) -> Tensor:
    """Enter a stage with block-correlated noise drawn in the same pass, each image's from its own seed.

    Computes ``alpha * upsample(x) + beta * n``. Within each 2x2 block, n has covariance
    ``(1 - g) I + g 1 1^T + 1e-6 I`` with g = -1/3; different blocks are independent. The noise has the same bits on
    every device and in any batch, equal to those of the engine's ``noise="counter"``.

    Args:
        x: ``[B, c, h, w]`` bf16, fp16, fp32 or fp64.
        seeds: ``[B]`` int64, as in :func:`initial_normals`.
        stage: index of the stage to enter, 0 or more; every stage has its own noise.
        alpha, beta: coefficients of the stage.

    Returns:
        ``[B, c, 2h, 2w]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype, device or number does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.4 and equation 6.
    """
    _check_state(x)
    _check_seeds(seeds, x)
    if not 0 <= stage < 2**31:
        raise ValueError(f"stage: got {stage}, expected 0 or more, below 2^31")
    return _renoise(x, None, seeds, stage, alpha, beta)


def training_pairs(
    images: Tensor,
    layout: PackedLayout,
    *,
    index: Tensor,
    spans: Tensor,
    tau: Tensor,
    patch_size: int,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    flip: Tensor | None = None,
    token_dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make noisy training inputs and target velocities for samples of all stages, as one pack.

    For a sample of stage s, ``d = S - 1 - s``. Its image x is halved d times (means of 2x2 blocks), and

        end = end_s down(x, d) + (1 - end_s) eps        token  = tau end + (1 - tau) start
        start = start_s up(down(x, d + 1)) + (1 - start_s) eps        target = end - start

    with the same standard normals eps in both, computed in float32; ``1 - v`` is computed in the dtype of v and then
    rounded. The results have the bits of the same expressions in eager PyTorch. Halving rounds as on CUDA: columns
    first.

    Args:
        images: ``[m, c, H, W]`` uint8 (converted by ``x / 127.5 - 1``) or float32 in [-1, 1]; any strides.
        layout: token grids of the ``n`` samples in the order of the pack; they determine how often each image is
            halved.
        index: ``[n]`` int64, the image of each sample. An index out of range raises on a CPU and makes the sample NaN
            on CUDA.
        spans: ``[S, 2]`` float64, start and end of each stage, smallest first; at most 6 stages.
        tau: ``[n]`` float64 or float32, local time of each sample.
        patch_size: ``p``.
        seeds: ``[n]`` int64 as in :func:`initial_normals`, to draw eps from. The four normals of a 2x2 block share a
            counter, whose purpose word separates them from those of sampling.
        noise: ``[T, c * p * p]`` float32, eps in the layout of the tokens; given instead of ``seeds``.
        flip: ``[n]`` bool, whether each sample shows its image mirrored left to right; eps is not mirrored.
        token_dtype: dtype of the noisy images: float32, bf16 or fp16.
        compiled: whether a CPU draws noise by compiled code, with the same bits. The first call takes seconds. A kernel
            draws its own noise, so this has no effect on CUDA.

    Returns:
        Tokens ``[T, c * p * p]`` in ``token_dtype`` and targets of the same shape in float32. The values of a patch are
        in (channel, row, column) order, the patches of an image in row-major order.

    Raises:
        ValueError: a shape, dtype, device or number does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, equations 3 to 5.
    """
    _check_images(images, layout, spans, patch_size)
    n, width = layout.num_images, images.shape[1] * patch_size**2
    _check_vector("index", index, n, (torch.int64,), images)
    _check_vector("tau", tau, n, (torch.float64, torch.float32), images)
    if flip is not None:
        _check_vector("flip", flip, n, (torch.bool,), images)
    if (seeds is None) == (noise is None):
        raise ValueError(
            f"noise: got {'neither noise nor seeds' if noise is None else 'seeds too'}, expected one of them"
        )
    if seeds is not None:
        _check_vector("seeds", seeds, n, (torch.int64,), images)
    if noise is not None:
        if noise.dtype != torch.float32 or tuple(noise.shape) != (layout.num_tokens, width):
            expected = f"torch.float32 ({layout.num_tokens}, {width})"
            raise ValueError(f"noise: got {noise.dtype} {tuple(noise.shape)}, expected {expected}")
        check_device("noise", noise, "images", images)
    check_dtype("token_dtype", token_dtype, TOKEN_DTYPES)
    return _training_pairs(
        images,
        index,
        flip,
        layout.cu_seqlens,
        spans,
        tau,
        seeds,
        noise,
        layout.num_tokens,
        patch_size,
        token_dtype,
        compiled,
    )


# --- validation --------------------------------------------------------------------------------------------


def _check_size(name: str, shape: tuple[int, ...]) -> None:
    """Limit the size of an image, because kernels index its elements with 32 bits."""
    if shape[0] * shape[1] * shape[2] >= 2**31:
        raise ValueError(f"{name}: got an image of {tuple(shape)}, expected fewer than 2^31 values")


def _check_seeds(seeds: Tensor, x: Tensor | None) -> None:
    if seeds.dtype != torch.int64:
        raise ValueError(f"seeds: got {seeds.dtype}, expected torch.int64")
    if seeds.ndim != 1 or (x is not None and seeds.shape[0] != x.shape[0]):
        expected = "one dimension [B]" if x is None else f"({x.shape[0]},): one for each image of x"
        raise ValueError(f"seeds: got shape {tuple(seeds.shape)}, expected {expected}")
    if x is not None:
        check_device("seeds", seeds, "x", x)


def _check_state(x: Tensor) -> tuple[int, ...]:
    """Validate ``x`` and return the shape after upsampling."""
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, c, h, w] with positive c, h and w")
    check_dtype("x", x.dtype)
    batch, channels, height, width = x.shape
    _check_size("x", (channels, 2 * height, 2 * width))
    return batch, channels, 2 * height, 2 * width


def _check_vector(name: str, x: Tensor, length: int, dtypes: tuple[torch.dtype, ...], images: Tensor) -> None:
    if tuple(x.shape) != (length,):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({length},): one for each image of the layout")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: got {x.dtype}, expected {' or '.join(str(t) for t in dtypes)}")
    check_device(name, x, "images", images)


def _check_images(images: Tensor, layout: PackedLayout, spans: Tensor, patch_size: int) -> None:
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images: got {images.dtype}, expected torch.uint8 or torch.float32")
    if images.ndim != 4 or min(images.shape[1:]) < 1:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected [m, c, H, W] with positive c, H and W")
    _, channels, height, width = images.shape
    _check_size("images", (channels, height, width))
    if spans.ndim != 2 or spans.shape[1] != 2 or not 1 <= spans.shape[0] <= MAX_STAGES:
        raise ValueError(f"spans: got shape {tuple(spans.shape)}, expected [S, 2] with S from 1 to {MAX_STAGES}")
    if spans.dtype != torch.float64:
        raise ValueError(f"spans: got {spans.dtype}, expected torch.float64")
    check_device("spans", spans, "images", images)
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, expected 1 or more")
    check_device("layout", layout.cu_seqlens, "images", images)
    sizes = [(height >> d, width >> d) for d in range(spans.shape[0]) if height % (2 << d) == width % (2 << d) == 0]
    fitting = {(h // patch_size, w // patch_size) for h, w in sizes if h % patch_size == w % patch_size == 0}
    for i, grid in enumerate(layout.grids):
        if grid not in fitting:
            known = ", ".join(f"{h}x{w}" for h, w in sorted(fitting, reverse=True)) or "none"
            raise ValueError(
                f"layout: got {grid[0]}x{grid[1]} tokens for image {i}, expected a size of {height}x{width} images at "
                f"one of {spans.shape[0]} stages with patches of {patch_size}, in even pixels: {known}"
            )


# --- operations --------------------------------------------------------------------------------------------


@custom_op("pixelflow::initial_normals", mutates_args=(), device_types="cpu")
def _initial_normals(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    return reference.initial_normals(seeds, (channels, height, width))


@launched_by(_initial_normals)
def _launch_initial_normals(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    from . import kernels

    out = seeds.new_empty(seeds.shape[0], channels, height, width, dtype=torch.float32)
    kernels.launch_initial(seeds.contiguous(), out)
    return out


@_initial_normals.register_fake
def _fake_initial_normals(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    return seeds.new_empty(seeds.shape[0], channels, height, width, dtype=torch.float32)


@custom_op("pixelflow::upsample_renoise", mutates_args=(), device_types="cpu")
def _renoise(x: Tensor, noise: Tensor | None, seeds: Tensor | None, stage: int, alpha: float, beta: float) -> Tensor:
    if noise is None:
        assert seeds is not None
        shape = (x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
        noise = reference.from_blocks(reference.correlate(reference.block_normals(seeds, stage, shape)))
    return reference.upsample_renoise(x.contiguous(), noise, alpha, beta)


@launched_by(_renoise)
def _launch_renoise(
    x: Tensor, noise: Tensor | None, seeds: Tensor | None, stage: int, alpha: float, beta: float
) -> Tensor:
    from . import kernels

    out = _fake_renoise(x, noise, seeds, stage, alpha, beta)
    kernels.launch_renoise(x.contiguous(), _dense(noise), _dense(seeds), out, stage, alpha, beta)
    return out


@_renoise.register_fake
def _fake_renoise(
    x: Tensor, noise: Tensor | None, seeds: Tensor | None, stage: int, alpha: float, beta: float
) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, 2 * height, 2 * width)


@custom_op("pixelflow::training_pairs", mutates_args=(), device_types="cpu")
def _training_pairs(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    cu_seqlens: Tensor,
    spans: Tensor,
    tau: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    num_tokens: int,
    patch_size: int,
    token_dtype: torch.dtype,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    outside = (index < 0) | (index >= images.shape[0])
    if bool(outside.any()):
        raise ValueError(f"index: got {index[outside][0].item()}, expected 0 to {images.shape[0] - 1}")
    draw = compiled_normals_at() if compiled else normals_at
    tokens, targets = reference.training_pairs(
        images, index, flip, cu_seqlens, spans, tau, seeds, noise, patch_size, draw
    )
    return tokens.to(token_dtype), targets


@launched_by(_training_pairs)
def _launch_training_pairs(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    cu_seqlens: Tensor,
    spans: Tensor,
    tau: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    num_tokens: int,
    patch_size: int,
    token_dtype: torch.dtype,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    from . import pairs

    tokens = images.new_empty(num_tokens, images.shape[1] * patch_size**2, dtype=token_dtype)
    targets = torch.empty_like(tokens, dtype=torch.float32)
    pairs.launch_pairs(
        images,
        index.contiguous(),
        _dense(flip),
        cu_seqlens.contiguous(),
        spans.contiguous(),
        tau.contiguous(),
        _dense(seeds),
        _dense(noise),
        tokens,
        targets,
        patch_size,
    )
    return tokens, targets


@_training_pairs.register_fake
def _fake_training_pairs(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    cu_seqlens: Tensor,
    spans: Tensor,
    tau: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    num_tokens: int,
    patch_size: int,
    token_dtype: torch.dtype,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    tokens = images.new_empty(num_tokens, images.shape[1] * patch_size**2, dtype=token_dtype)
    return tokens, torch.empty_like(tokens, dtype=torch.float32)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
