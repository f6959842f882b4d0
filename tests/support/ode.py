"""Helpers for the ode_step tests: inputs, a velocity field, and an independent implementation of the steps.

The independent implementation is NumPy in float64 and, for the step size controller, plain Python for a single image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pixelflow_engine import guidance as engine_guidance
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import ARRIVED, MAX_ATTEMPTS, NONFINITE, RUNNING, UNDERFLOW

F64 = torch.float64
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38, -3e38, 1.0, 2.0**-149)
TOLERANCE = (1e-3, 1e-6)  # rtol, atol

# --- inputs ------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) * std).to(dtype)


def hostile(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw values of three kinds: normal, whose sums round; random bits (any exponent, infinities, NaN); special."""
    generator = torch.Generator().manual_seed(seed)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    size = math.prod(shape)
    bits = torch.randint(-(2**62), 2**62, (size,), generator=generator) * 2
    x = (bits >> (64 - 8 * dtype.itemsize)).to(integer).view(dtype)
    x = x.nan_to_num(torch.nan, torch.inf, -torch.inf)  # one kind of NaN: 16 random bits may well be the poison's
    special = torch.tensor(SPECIAL, dtype=F64).to(dtype)
    chosen = torch.randint(0, 10 * len(special), (size,), generator=generator)
    x = torch.where(chosen < 5 * len(special), torch.randn(size, generator=generator, dtype=F64).to(dtype), x)
    return torch.where(chosen < len(special), special[chosen % len(special)], x).view(shape)


def numbers(images: int, seed: int = 3) -> Tensor:
    """Draw float64 numbers ``[images]`` in (0, 1) that float32 cannot represent."""
    return torch.rand(images, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sliced(velocity: Tensor, width: int) -> Tensor:
    """Return the same values as rows ``[R, width]`` in the middle of wider rows of NaN."""
    rows = velocity.reshape(-1, width)
    wide = torch.full((rows.shape[0], width + 24), torch.nan, dtype=rows.dtype, device=rows.device)
    wide[:, 16 : 16 + width] = rows
    return wide[:, 16 : 16 + width]


def tolerance(device: str = "cpu") -> Tensor:
    return torch.tensor(TOLERANCE, dtype=F64, device=device)


class Field:
    """A smooth, nonlinear, time-dependent velocity field with a pace per image; with guidance it returns both halves.

    It works in any layout: it couples each value with its mirror image within the flattened image.
    """

    def __init__(self, paces: Sequence[float], weight: float | None, dtype: torch.dtype | None = None) -> None:
        self.paces, self.weight, self.dtype = paces, weight, dtype
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
        """Return the velocity as the operations take it: with guidance both halves, in ``dtype`` if given."""
        self.times.append(tau.clone())
        images = len(self.paces)
        y = x.reshape(images, x.numel() // max(images, 1))
        pace = torch.tensor(self.paces, dtype=x.dtype, device=x.device)[:, None]
        v = pace * (torch.tanh(y.flip(1)) * torch.cos(5 * tau).to(x.dtype)[:, None] - 0.3 * y)
        v = v if self.weight is None else torch.cat([0.5 * v + 0.1, v])
        copies = 1 if self.weight is None else 2
        v = v.view(copies * x.shape[0], *x.shape[1:])
        return v if self.dtype is None else v.to(self.dtype)

    def combined(self, x: Tensor, tau: Tensor) -> Tensor:
        """Return the guided velocity as the engine's solver takes it."""
        v = self(x, tau).to(x.dtype)
        return v if self.weight is None else engine_guidance.combine(v, self.weight)


# --- the same mathematics, a second time -----------------------------------------------------------------------


def guided64(velocity: Tensor, weight: Sequence[float] | None, images: int) -> np.ndarray:
    """Return ``(1 - w) null + w conditional``, ``[B, n]`` float64."""
    v = velocity.detach().cpu().double().numpy()
    if weight is None:
        return v.reshape(images, -1)
    null, conditional = v.reshape(2, images, -1)
    w = np.broadcast_to(np.asarray(weight, dtype=np.float64), (images,))[:, None]
    return (1 - w) * null + w * conditional


def moved64(x: Tensor, slopes: np.ndarray, h: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """Return ``x + h sum_i w_i k_i`` for slopes ``[S, B, n]``."""
    images = slopes.shape[1]
    weights = np.pad(np.asarray(weights, dtype=np.float64), (0, slopes.shape[0] - len(weights)))
    h = np.broadcast_to(np.asarray(h, dtype=np.float64), (images,))
    return x.detach().cpu().double().numpy().reshape(images, -1) + h[:, None] * np.einsum("s,sbn->bn", weights, slopes)


def rms64(values: np.ndarray, scale: np.ndarray, batch_wide: bool) -> Tensor:
    """Return ``[B]``: the root mean square of ``values / scale``, of each image or of the whole batch."""
    ratio = values / scale
    if batch_wide:
        return torch.full((len(ratio),), np.linalg.norm(ratio) / math.sqrt(ratio.size), dtype=F64)
    return torch.from_numpy(np.linalg.norm(ratio, axis=1) / math.sqrt(ratio.shape[1]))


def error64(x: Tensor, slopes: np.ndarray, h: Sequence[float], batch_wide: bool) -> Tensor:
    """Return the norm of Dopri5's error estimate."""
    rtol, atol = TOLERANCE
    before = moved64(x, slopes, h, [])
    after = moved64(x, slopes, h, DOPRI5.coupling[-1])
    error = moved64(torch.zeros_like(x), slopes, h, DOPRI5.error)
    return rms64(error, atol + rtol * np.maximum(abs(before), abs(after)), batch_wide)


def attempt_by_hand(
    tau: float, step: float, status: int, counts: tuple[int, int], ratio: float, order: int, max_attempts: int
) -> tuple[float, float, float, list[float], int, tuple[int, int], bool]:
    """Return ``h, tau, step, times, status, (accepted, rejected), accept`` of one image after an attempt."""
    moves = status == RUNNING and tau < 1
    left = 1 - tau
    h = min(step, left) if moves else 0.0
    arrives = moves and step >= left
    times = [(1.0 if arrives else tau + h) if c == 1 else tau + c * h for c in DOPRI5.nodes]
    if not moves:
        return h, tau, step, times, status, counts, False
    if not math.isfinite(ratio):
        return h, tau, step, times, NONFINITE, counts, False
    if times[-1] == tau:
        return h, tau, step, times, UNDERFLOW, counts, False
    accept = ratio <= 1
    if ratio == 0:
        factor = 10.0
    else:
        factor = 0.9 / ratio ** (1 / order)
        factor = min(10.0, max(factor, 1.0 if ratio < 1 else 0.2))
    counts = (counts[0] + accept, counts[1] + (not accept))
    tau = times[-1] if accept else tau
    if tau == 1:
        status = ARRIVED
    elif sum(counts) >= max_attempts:
        status = MAX_ATTEMPTS
    return h, tau, h * factor, times, status, counts, accept


# --- comparison ------------------------------------------------------------------------------------------------


def assert_norms(out: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, ulps: float = 1.0) -> None:
    """Assert level D for each image: twice plain PyTorch's error plus two roundings in the type of the state.

    Args:
        ulps: size of a rounding, in half units: 1 where quotients are rounded correctly; 4 for the fast division of the
            compiled kernels, which is accurate to 2 units.
    """
    error, of_plain = (out.cpu() - truth).abs(), (plain.cpu() - truth).abs()
    bound = 2 * of_plain + 2 * ulps * torch.finfo(dtype).eps / 2 * truth
    assert bool((error <= bound).all()), f"errors {error.tolist()}, bounds {bound.tolist()}"
