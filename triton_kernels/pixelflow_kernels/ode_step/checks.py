"""Argument checks of the ODE operations. Every error names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STATE_TYPES = (torch.float32, torch.float64)
VELOCITY_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGEST_IMAGE = 2**30  # values; positions within an image are 32-bit integers


def check_state(x: Tensor, name: str = "x") -> None:
    """Require a contiguous float32 or float64 tensor that does not require grad."""
    if x.dtype not in STATE_TYPES:
        raise ValueError(f"{name}: got {x.dtype}, expected float32 or float64")
    check_contiguous(name, x)
    check_no_grad(name, x)


def check_like(name: str, y: Tensor, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """Require a contiguous tensor with the dtype and device of the state, and with its shape or ``shape``."""
    expected = tuple(x.shape if shape is None else shape)
    if tuple(y.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(y.shape)}, expected {expected}")
    if y.dtype != x.dtype:
        raise ValueError(f"{name}: got {y.dtype}, expected the type of x ({x.dtype})")
    check_device(name, y, x.device)
    check_contiguous(name, y)
    check_no_grad(name, y)


def check_slopes(slopes: Tensor, x: Tensor, at_least: int) -> None:
    """Require ``[S, *x.shape]`` with ``S >= at_least``."""
    if slopes.ndim != x.ndim + 1 or slopes.shape[0] < at_least:
        raise ValueError(f"slopes: got shape {tuple(slopes.shape)}, expected {at_least} or more of {tuple(x.shape)}")
    check_like("slopes", slopes, x, (slopes.shape[0], *x.shape))


def check_velocity(velocity: Tensor, x: Tensor, images: int, guidance: Tensor | None) -> None:
    """Require as many values as the state, twice as many with guidance; contiguous, or rows of dense channels."""
    check_no_grad("velocity", velocity)
    if velocity.dtype not in VELOCITY_TYPES or torch.promote_types(velocity.dtype, x.dtype) != x.dtype:
        wanted = "bfloat16, float16 or float32" + (", or float64" if x.dtype == torch.float64 else "")
        raise ValueError(f"velocity: got {velocity.dtype}, expected {wanted} for a state in {x.dtype}")
    check_device("velocity", velocity, x.device)
    halves = 1 if guidance is None else 2
    if velocity.numel() != halves * x.numel() or (velocity.ndim > 0 and velocity.shape[0] % halves != 0):
        what = "with guidance, null half first" if halves == 2 else "without guidance"
        raise ValueError(
            f"velocity: got shape {tuple(velocity.shape)}, expected {halves * x.numel()} values for x of shape "
            f"{tuple(x.shape)} {what}"
        )
    if velocity.is_contiguous():
        return
    if velocity.ndim != 2 or velocity.stride(1) != 1 or velocity.stride(0) < velocity.shape[1]:
        raise ValueError(
            f"velocity: got strides {velocity.stride()}, expected a contiguous tensor or rows [R, W] of dense channels"
        )
    if (x.numel() // max(images, 1)) % velocity.shape[1] != 0:
        raise ValueError(
            f"velocity: got rows of {velocity.shape[1]} values that are not contiguous, expected whole rows in each of "
            f"{images} images of {x.numel() // max(images, 1)} values"
        )


def check_images(x: Tensor, images: int, name: str) -> None:
    """Require that the state divides into ``images`` images of at least one value."""
    if images == 0 and x.numel() == 0:
        return
    if images <= 0 or x.numel() % images != 0:
        raise ValueError(f"{name}: got {images} images, expected a divisor of the {x.numel()} values of x")
    if x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one value in each of {images} images")
    if x.numel() // images > LARGEST_IMAGE:
        raise ValueError(
            f"x: got {x.numel() // images} values in each of {images} images, expected at most {LARGEST_IMAGE}: pass "
            "step as a tensor with one entry per image, or treat each token as an image and repeat its image's entry"
        )


def check_numbers(name: str, numbers: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Require one dimension, contiguous, with one of ``dtypes``."""
    if numbers.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(numbers.shape)}, expected one dimension")
    if numbers.dtype not in dtypes:
        raise ValueError(f"{name}: got {numbers.dtype}, expected {' or '.join(str(t) for t in dtypes)}")
    check_device(name, numbers, device)
    check_contiguous(name, numbers)
    check_no_grad(name, numbers)


def check_per_image(name: str, numbers: Tensor, dtype: torch.dtype, images: int, device: torch.device) -> None:
    """Require ``[B]`` with this dtype."""
    check_numbers(name, numbers, (dtype,), device)
    if numbers.shape[0] != images:
        raise ValueError(f"{name}: got {numbers.shape[0]} entries, expected one for each of {images} images")


def check_guidance(guidance: Tensor | float | None, images: int, device: torch.device) -> Tensor | None:
    """Validate ``guidance`` and return it as a tensor with one entry or one per image; None stays None."""
    if guidance is None:
        return None
    if not isinstance(guidance, Tensor):
        return torch.full((1,), guidance, dtype=torch.float64, device=device)
    check_numbers("guidance", guidance, STATE_TYPES, device)
    if guidance.shape[0] not in (1, images):
        raise ValueError(f"guidance: got {guidance.shape[0]} entries, expected 1 or one for each of {images} images")
    return guidance


def check_weights(name: str, weights: Sequence[float], at_most: int) -> list[float]:
    """Require 1 to ``at_most`` weights, not all 0; return them as floats."""
    if not 0 < len(weights) <= at_most:
        raise ValueError(f"{name}: got {len(weights)} weights, expected 1 to {at_most}")
    if not any(weights):
        raise ValueError(f"{name}: got nothing but zeros, expected a weight that is not 0")
    return [float(w) for w in weights]


def check_tolerance(tolerance: Tensor, device: torch.device) -> None:
    """Require ``(rtol, atol)`` as ``[2]`` float64."""
    check_per_image("tolerance", tolerance, torch.float64, 2, device)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Require ``x`` to be on ``device``."""
    if x.device != device:
        raise ValueError(f"{name}: got device {x.device}, expected {device}")


def check_contiguous(name: str, x: Tensor) -> None:
    """Require a contiguous tensor."""
    if not x.is_contiguous():
        raise ValueError(f"{name}: got strides {x.stride()}, expected a contiguous tensor")


def check_no_grad(name: str, x: Tensor) -> None:
    """Refuse a tensor that requires grad while gradients are enabled, because no operation here is differentiable."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected one that does not: the updates are for sampling and "
            "have no backward; call them under torch.no_grad(), or differentiate the plain PyTorch solver"
        )
