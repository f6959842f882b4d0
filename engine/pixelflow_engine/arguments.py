"""Validation of arguments. Every error names the argument, the value given and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import guidance
from .config import MAX_SIDE, MAX_STEPS, ModelConfig, PixelFlowConfig, check_size
from .noise import MAX_SEED
from .operations import Text


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Validate a string that must be one of ``options``."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(options)}")
    return str(value)


def finite_number(name: str, value: object) -> float:
    """Validate a finite number of Python, numpy or torch, where an array or tensor without dimensions is one."""
    try:
        number = value.item() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0 else value
        finite = not isinstance(number, bool) and isinstance(number, numbers.Real) and math.isfinite(number)
    except (OverflowError, RuntimeError):  # an integer too large for a float; a tensor without data
        finite = False
    if not finite:
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
    return float(number)  # type: ignore[arg-type]


def positive_number(name: str, value: object) -> float:
    """Validate a finite number above 0."""
    number = finite_number(name, value)
    if number <= 0:
        raise ValueError(f"{name}: got {value!r}, expected a number above 0")
    return number


def positive_integer(name: str, value: object) -> int:
    """Validate an integer of at least 1."""
    number = integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
    return number


def truth(name: str, value: object) -> bool:
    """True or False, Python's or numpy's; nothing else that happens to be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def callback(name: str, value: object) -> None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}: got {value!r}, expected None or something to call")


def batch_sizes(value: object) -> tuple[int, ...]:
    """Validate ``batch_sizes``: positive integers, returned in ascending order without duplicates."""
    several = sequence(value)
    if not several:
        raise ValueError(f"batch_sizes: got {value!r}, expected None or a list of integers of at least 1")
    return tuple(sorted({positive_integer(f"batch_sizes[{i}]", size) for i, size in enumerate(several)}))


def integer(value: object) -> int | None:
    """Convert an integer of Python, numpy or torch to a Python int; None for anything else, including booleans."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def sequence(value: object) -> list[Any] | None:
    """Convert a list, tuple, range, or one-dimensional array or tensor to a list; None for anything else."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist() if value.ndim == 1 else None
    return list(value) if isinstance(value, (list, tuple, range)) else None


def steps(value: object, num_stages: int) -> tuple[int, ...]:
    """Validate ``num_inference_steps``: one number for all stages or one per stage."""
    name = "num_inference_steps"
    several = sequence(value)
    if several is None:
        return (_step_count(name, value),) * num_stages
    if len(several) != num_stages:
        raise ValueError(f"{name}: got {len(several)} values, expected {num_stages}, one per stage")
    return tuple(_step_count(f"{name}[{i}]", v) for i, v in enumerate(several))


def _step_count(name: str, value: object) -> int:
    number = positive_integer(name, value)
    if number > MAX_STEPS:
        raise ValueError(f"{name}: got {value!r}, expected at most {MAX_STEPS} steps")
    return number


def guidance_weights(scale: object, schedule: object, num_stages: int) -> tuple[float, ...]:
    """Validate ``guidance_scale`` and ``guidance_schedule``; returns the weight of each stage."""
    number = finite_number("guidance_scale", scale)
    several = sequence(schedule)
    if several is not None:
        if len(several) != num_stages:
            raise ValueError(f"guidance_schedule: got {len(several)} weights, expected {num_stages}, one per stage")
        return tuple(finite_number(f"guidance_schedule[{i}]", w) for i, w in enumerate(several))
    if choice("guidance_schedule", schedule, ("stagewise", "constant")) == "constant":
        return (number,) * num_stages
    return guidance.stagewise_weights(number, num_stages)


def labels(value: object, model: ModelConfig) -> Tensor:
    """Validate ``class_labels``: integers from 0 to ``num_classes`` (the null class); returns ``[B]`` int64.

    The result is on the host, because a call is checked before anything is moved to a device.
    """
    if model.num_classes == 0:
        raise ValueError(f"class_labels: got {value!r}, expected None for a model without classes")
    if isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype == torch.bool):
        raise ValueError(f"class_labels: got {_shape(value)}, expected integers")
    single = integer(value)
    several = sequence(value) if single is None else [single]
    if not several:
        got = _shape(value) if isinstance(value, Tensor) and value.ndim > 1 else repr(value)
        raise ValueError(f"class_labels: got {got}, expected an integer or a non-empty list of integers")
    numbers = [label(f"class_labels[{i}]", v, model) for i, v in enumerate(several)]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def label(name: str, value: object, model: ModelConfig) -> int:
    """Validate a class of the model, or the null class."""
    if model.num_classes == 0:
        raise ValueError(f"{name}: got {value!r}, expected None for a model without classes")
    number = integer(value)
    if number is None or not 0 <= number <= model.num_classes:
        raise ValueError(
            f"{name}: got {value!r}, expected an integer from 0 to {model.num_classes} "
            f"({model.num_classes} is the null class)"
        )
    return number


def prompt(value: object, model: ModelConfig) -> Tensor:
    """Validate one image's ``encoder_hidden_states [L, E]``; returned as given."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise ValueError(
            f"encoder_hidden_states: got {_shape(value)}, expected a tensor [L, {model.cross_attention_dim}]"
        )
    if value.shape[1] != model.cross_attention_dim or value.numel() == 0 or not value.dtype.is_floating_point:
        raise ValueError(
            f"encoder_hidden_states: got {_shape(value)}, expected floats of at least one text token, "
            f"[L, {model.cross_attention_dim}]"
        )
    return value


def same_device(name: str, values: Sequence[Tensor]) -> None:
    """Refuse requests' prompts on several devices: they are stacked, and none is moved before everything is checked."""
    for i, value in enumerate(values):
        if value.device != values[0].device:
            raise ValueError(
                f"class_labels[{i}]: {name}: got a tensor on {value.device}, expected {values[0].device}, "
                "as of class_labels[0]"
            )


def text(prefix: str, states: object, mask: object, model: ModelConfig) -> Text:
    """Validate ``<prefix>encoder_hidden_states [B, L, E]`` and ``<prefix>encoder_attention_mask [B, L]`` or None.

    Both are returned as given. That a mask holds only 0 and 1 is a separate check, :func:`mask_values`, because it has
    to read the mask from its device.
    """
    name, mask_name = f"{prefix}encoder_hidden_states", f"{prefix}encoder_attention_mask"
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[2] != model.cross_attention_dim:
        raise ValueError(f"{name}: got {_shape(states)}, expected a tensor [B, L, {model.cross_attention_dim}]")
    if states.numel() == 0 or not states.dtype.is_floating_point:
        raise ValueError(f"{name}: got {_shape(states)}, expected floats of at least one image and one text token")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != states.shape[:2]):
        raise ValueError(f"{mask_name}: got {_shape(mask)}, expected a tensor {tuple(states.shape[:2])}")
    return Text(states, mask)


def mask_values(prefix: str, text: Text | None) -> None:
    """Validate that ``<prefix>encoder_attention_mask`` holds only 0 and 1; reads the mask from its device."""
    if text is None or text.mask is None:
        return
    others = text.mask[(text.mask != 0) & (text.mask != 1)]
    if len(others):
        name = f"{prefix}encoder_attention_mask"
        raise ValueError(f"{name}: got a value of {others[0].item()}, expected 0 and 1 alone")


def no_text(model: ModelConfig, **given: object) -> None:
    """Refuse text arguments for a model without cross-attention."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: got {_shape(value)}, expected None for a model without cross-attention")


def per_image_seeds(value: object, batch: int) -> tuple[int, ...]:
    """Validate ``seed`` for counter noise; returns one seed per image.

    Args:
        value: one seed per image, or the first image's seed, from which the others count up, or None for fresh seeds.
        batch: number of images.
    """
    if value is None:
        return tuple(fresh_seed() for _ in range(batch))
    several = sequence(value)
    if several is not None:
        if len(several) != batch:
            raise ValueError(f"seed: got {len(several)} seeds, expected {batch}, one per image")
        return tuple(seed(f"seed[{i}]", v) for i, v in enumerate(several))
    first = seed("seed", value)
    return tuple((first + i) % (MAX_SEED + 1) for i in range(batch))


def stream_seed(value: object) -> int | None:
    """Validate ``seed`` for the published random stream: one for the batch, or None for torch's global generator."""
    if sequence(value) is not None:
        raise ValueError(f"seed: got {value!r}, expected one integer: noise='public' is one stream for the batch")
    return None if value is None else seed("seed", value)


def seed(name: str, value: object) -> int:
    """Validate the seed of one image's noise."""
    number = integer(value)
    if number is None or not 0 <= number <= MAX_SEED:
        raise ValueError(f"{name}: got {value!r}, expected an integer from 0 to 2^64 - 1")
    return number


def image_size(name: str, value: object, config: PixelFlowConfig) -> int:
    """Validate ``height`` or ``width`` in pixels; None is the model's resolution."""
    if value is None:
        return config.resolution
    number = integer(value)
    if number is not None and number > MAX_SIDE:
        raise ValueError(f"{name}: got {value!r}, expected at most {MAX_SIDE} pixels")
    return check_size(name, value if number is None else number, config)


def images(x: object, model: ModelConfig) -> Tensor:
    """Validate ``x``: an image batch ``[B, c, h, w]`` of whole patches."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != model.in_channels or not x.dtype.is_floating_point:
        raise ValueError(f"x: got {_shape(x)}, expected a float tensor [B, {model.in_channels}, h, w]")
    p = model.patch_size
    if x.shape[2] % p or x.shape[3] % p or x.numel() == 0:
        raise ValueError(
            f"x: got {_shape(x)}, expected height and width to be positive multiples of the patch size {p}"
        )
    return x


def per_image(name: str, value: Any, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Expand one number or ``[B]`` numbers to ``[B]``; for an integer ``dtype`` they must be positive integers."""
    try:
        if not isinstance(value, Tensor):  # by way of NumPy: torch takes numbers in the caller's default type
            value = torch.from_numpy(np.asarray(value))
        tensor = value.to(device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got {value!r}, expected one number or {batch}, one per image") from None
    if tensor.ndim > 1 or (tensor.ndim == 1 and tensor.shape[0] not in (1, batch)) or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: got {_shape(tensor)}, expected one number or {batch}, one per image")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: got {tensor.tolist()}, expected finite numbers")
    if not dtype.is_floating_point and (tensor.dtype.is_floating_point or bool((tensor < 1).any())):
        raise ValueError(f"{name}: got {tensor.tolist()}, expected integers of at least 1")
    return tensor.to(dtype).expand(batch)


def same_batch(name: str, got: int, expected: int) -> None:
    """Validate a count that must equal the number of images."""
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected}, one per image")


def fresh_seed() -> int:
    """A random seed from the operating system."""
    return secrets.randbits(64)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Prefix errors with the name of the object that the refused argument belongs to."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def dtype_of_weights(dtype: object) -> None:
    """Validate ``dtype``, that of weights and matrix products."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: got {dtype!r}, expected torch.float32, bfloat16, float16 or float64")


def automatic(device: str) -> str:
    """A command's ``device``, for which ``auto`` is a GPU if there is one, otherwise the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def place(device: torch.device | str) -> torch.device:
    """Validate ``device``: it must exist and be usable."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (
        RuntimeError, AssertionError, TypeError, NotImplementedError, OverflowError, ValueError, ImportError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {str(device)!r}, expected a device that is there ({reason})") from None
    if found.type == "meta":
        raise ValueError("device: got 'meta', expected one whose tensors have values")
    return found


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__
