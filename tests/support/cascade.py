"""Inputs for the cascade tests, and an independent implementation in NumPy without the project's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.philox import seed_tensor
from support import kernels

U = 2.0**-24
"""Half a unit in the last place of float32 at 1."""

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-42, -1.1e-38, 3.4e38, -3.4e38, 1.0, 1 / 3]
SEEDS = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
ALPHA, BETA = 0.8, 0.4618802153517006
SPANS = ((0.0, 0.25), (1 / 7, 0.5), (1 / 3, 0.75), (0.6, 1.0))  # of the four stages


# --- noise -------------------------------------------------------------------------------------------------


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python integers, as defined in its paper."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 ^ x[1] ^ k[0], b % 2**32, a >> 32 ^ x[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def normals(seed: int, stage: int, purpose: int, position: int) -> list[float]:
    """Return the four normals of one counter, in double precision."""
    words = philox((position, stage, purpose, 0), (seed % 2**32, seed >> 32))
    found = []
    for first, second in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log((2 * (first >> 9) + 1) / 2**24))
        angle = math.pi / 2 * ((second >> 30) + (2 * (second >> 7 & 0x7FFFFF) + 1) / 2**24 - 0.5)
        found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found


def image_normals(seed: int, stage: int, purpose: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return independent normals ``[c, h, w]`` in double precision, one counter per 2x2 block."""
    channels, height, width = shape
    out = np.empty(shape)
    position = 0
    for c in range(channels):
        for y in range(0, height, 2):
            for x in range(0, width, 2):
                out[c, y : y + 2, x : x + 2] = np.reshape(normals(seed, stage, purpose, position), (2, 2))
                position += 1
    return out


def covariance(gamma: float = -1 / 3) -> np.ndarray:
    """Return the covariance of a 2x2 block of block noise."""
    return (1 - gamma + 1e-6) * np.eye(4) + gamma * np.ones((4, 4))


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric square root, by which block noise is made."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values) @ vectors.T)


def correlated(z: np.ndarray) -> np.ndarray:
    """Make block noise ``[c, h, w]`` from independent normals."""
    root, out = symmetric_root(covariance()), np.empty_like(z)
    for y in range(0, z.shape[1], 2):
        for x in range(0, z.shape[2], 2):
            block = z[:, y : y + 2, x : x + 2].reshape(-1, 4)
            out[:, y : y + 2, x : x + 2] = (block @ root).reshape(-1, 2, 2)
    return out


def renoised_bits(x: Tensor, noise: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * upsample(x) + beta * noise`` in NumPy's float32 (or float64), each operation rounded by itself."""
    number = x.numpy().dtype.type
    big = x.numpy().repeat(2, -1).repeat(2, -2)
    with np.errstate(all="ignore"):
        return torch.from_numpy(number(alpha) * big + number(beta) * noise.numpy().astype(big.dtype))


def states(shape: Sequence[int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Draw normals in which every seventh value is special: signed zeros, infinities, NaN, denormals, the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(dtype).flatten()
    values = torch.tensor(SPECIAL).to(dtype)
    x[::7] = values[torch.arange(len(x[::7])) % len(values)]
    return x.reshape(*shape).to(device)


def specials(shape: Sequence[int], seed: int) -> Tensor:
    """Draw finite special values only: sums of neighbours overflow, halves of denormals round."""
    finite = torch.tensor([v for v in SPECIAL if math.isfinite(v)])
    return finite[torch.randint(0, len(finite), tuple(shape), generator=torch.Generator().manual_seed(seed))]


# --- training pairs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pack:
    """The inputs of training pairs, in the order of the operation's arguments."""

    images: Tensor
    grids: list[tuple[int, int]]
    index: Tensor
    flip: Tensor | None
    spans: Tensor
    tau: Tensor
    seeds: Tensor | None
    noise: Tensor | None
    patch_size: int

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout.from_grids(self.grids, self.images.device)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a launch, up to its outputs."""
        cu_seqlens = self.layout.cu_seqlens
        return self.images, self.index, self.flip, cu_seqlens, self.spans, self.tau, self.seeds, self.noise

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of the public function."""
        names = ("index", "flip", "spans", "tau", "seeds", "noise", "patch_size")
        return {name: getattr(self, name) for name in names}

    def to(self, device: str) -> Pack:
        """Return the pack on another device."""
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        return Pack(**moved)

    def shape(self) -> tuple[int, int]:
        """Return the shape of both outputs."""
        return sum(r * c for r, c in self.grids), self.images.shape[1] * self.patch_size**2


def truth(pack: Pack, eps: Callable[[int, tuple[int, int, int], int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets in double precision; ``eps(sample, shape, stage)`` gives noise ``[c, h, w]``."""
    p, S = pack.patch_size, len(pack.spans)
    tokens, targets = [np.empty((0, pack.shape()[1]))], [np.empty((0, pack.shape()[1]))]
    for i, (rows, columns) in enumerate(pack.grids):
        image = pack.images[int(pack.index[i])].numpy().astype(np.float64)
        if pack.images.dtype == torch.uint8:
            image = image / 127.5 - 1
        if pack.flip is not None and pack.flip[i]:
            image = image[:, :, ::-1]
        channels, height = image.shape[:2]
        shrink = height // (rows * p)
        stage = S - 1 - int(math.log2(shrink))
        (start, end), tau = pack.spans[stage].tolist(), float(pack.tau[i])

        def mean(n: int, image: np.ndarray = image) -> np.ndarray:
            c, h, w = image.shape
            return np.asarray(image.reshape(c, h // n, n, w // n, n).mean((2, 4)))

        noise = eps(i, (channels, rows * p, columns * p), stage)
        high = end * mean(shrink) + (1 - end) * noise
        low = start * np.kron(mean(2 * shrink), np.ones((1, 2, 2))) + (1 - start) * noise
        for found, value in ((tokens, tau * high + (1 - tau) * low), (targets, high - low)):
            for y in range(0, rows * p, p):
                for x in range(0, columns * p, p):
                    found.append(value[:, y : y + p, x : x + p].reshape(1, -1))
    return np.concatenate(tokens), np.concatenate(targets)


def given(pack: Pack) -> Callable[[int, tuple[int, int, int], int], np.ndarray]:
    """Return a function that takes each sample's noise from the pack's tokens."""
    assert pack.noise is not None
    first = np.cumsum([0, *(r * c for r, c in pack.grids)])

    def eps(i: int, shape: tuple[int, int, int], stage: int) -> np.ndarray:
        out, p, n = np.empty(shape), pack.patch_size, first[i]
        for y in range(0, shape[1], p):
            for x in range(0, shape[2], p):
                out[:, y : y + p, x : x + p] = pack.noise[n].double().numpy().reshape(-1, p, p)  # type: ignore[index]
                n += 1
        return out

    return eps


def drawn(pack: Pack) -> Callable[[int, tuple[int, int, int], int], np.ndarray]:
    """Return a function that draws each sample's noise from its seed; purpose 1 is training."""
    assert pack.seeds is not None
    seeds = [seed % 2**64 for seed in pack.seeds.tolist()]
    return lambda i, shape, stage: image_normals(seeds[i], stage, 1, shape)


def bounds(pack: Pack, largest_eps: float) -> tuple[float, float]:
    """Return bounds on the errors of float32 tokens and of targets.

    Counted in roundings at the size ``M = max|x| + max|eps|``: two per halving and two for converting uint8; for each
    end of the path two products of rounded coefficients and a sum (5, the halves of a sum share their M); 3 for the
    interpolation; for the target both ends and their difference (2 more).
    """
    x = 1.0 if pack.images.dtype == torch.uint8 else pack.images.abs().max().item()
    values = 2 * len(pack.spans) + 2
    size = (x + largest_eps) * U * 1.01
    return (values + 8) * size, (2 * (values + 5) + 2) * size


def make_pack(
    *,
    seed: int,
    stages: int,
    patch_size: int,
    channels: int,
    smallest: tuple[int, int],
    halvings: Sequence[int],
    num_images: int = 2,
    uint8: bool = True,
    flips: bool = True,
    draw: bool = False,
    low_tau: bool = False,
    strided: bool = False,
) -> Pack:
    """Make a pack whose smallest stage has ``smallest`` patches, in units that keep every size even."""
    r = torch.Generator().manual_seed(seed)
    unit = 1 if patch_size % 2 == 0 else 2
    rows, columns = (n * unit << (stages - 1) for n in smallest)
    shape = (num_images, channels, rows * patch_size, columns * patch_size)
    if uint8:
        images = torch.randint(0, 256, shape, generator=r, dtype=torch.uint8)
    else:
        images = 2 * torch.rand(shape, generator=r) - 1
    if strided:  # stored as height, width, channel; columns apart, with NaN (or an unused number) between them
        outer = torch.full((*shape[:1], *shape[2:], channels + 2), 170 if uint8 else torch.nan, dtype=images.dtype)
        outer[..., 1:-1] = images.permute(0, 2, 3, 1)
        images = outer[..., 1:-1].permute(0, 3, 1, 2)
    n = len(halvings)
    grids = [(rows >> d, columns >> d) for d in halvings]
    tokens = sum(a * b for a, b in grids)
    tau = torch.randint(0, 1000, (n,), generator=r).double() / 1000
    return Pack(
        images=images,
        grids=grids,
        index=torch.randint(0, num_images, (n,), generator=r),
        flip=torch.randint(0, 2, (n,), generator=r).bool() if flips else None,
        spans=torch.tensor(SPANS[-stages:] if stages <= 4 else SPANS * 2, dtype=torch.float64)[:stages],
        tau=tau.float() if low_tau else tau,
        seeds=seed_tensor([SEEDS[(seed + i) % len(SEEDS)] for i in range(n)]) if draw else None,
        noise=None if draw else torch.randn(tokens, channels * patch_size**2, generator=r),
        patch_size=patch_size,
    )


@st.composite
def pair_packs(draw: st.DrawFn, *, drawn_noise: bool | None = None, max_samples: int = 4, max_side: int = 3) -> Pack:
    """Draw packs of 0 to 4 samples at any of 1 to 4 stages: any patch size, odd channels, not square."""
    stages = draw(st.integers(1, 4))
    largest = min(max_side, 4 - stages // 2)
    return make_pack(
        seed=draw(st.integers(0, 2**31 - 1)),
        stages=stages,
        patch_size=draw(st.sampled_from([1, 2, 3, 4, 6] if stages < 4 else [1, 2, 4])),
        channels=draw(st.integers(1, 4)),
        smallest=(draw(st.integers(1, largest)), draw(st.integers(1, largest))),
        halvings=draw(st.lists(st.integers(0, stages - 1), max_size=max_samples)),
        num_images=draw(st.integers(1, 3)),
        uint8=draw(st.booleans()),
        flips=draw(st.booleans()),
        draw=draw(st.booleans()) if drawn_noise is None else drawn_noise,
        low_tau=draw(st.booleans()),
        strided=draw(st.booleans()),
    )


def launched(pack: Pack, token_dtype: torch.dtype, config: dict[str, int] | None = None) -> tuple[Tensor, Tensor]:
    """Return tokens and targets from the kernel, written into poisoned buffers that are checked."""
    from pixelflow_kernels.cascade import pairs

    device = pack.images.device
    outputs = [
        kernels.poisoned(*pack.shape(), dtype=t, device=device, dense=True) for t in (token_dtype, torch.float32)
    ]
    pairs.launch_pairs(*pack.arguments(), outputs[0].out, outputs[1].out, pack.patch_size, config)
    for name, output in zip(("tokens", "targets"), outputs, strict=True):
        kernels.assert_filled(*output, name)
    return outputs[0].out, outputs[1].out
