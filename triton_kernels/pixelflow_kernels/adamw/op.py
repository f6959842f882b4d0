"""Gradient norm and update of a whole model: validation and registration of the implementations.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``kernels``, imported on
first use because Triton is not installed everywhere). Neither synchronises with the device. Any contiguous tensors are
accepted: parameters, views into a bucket of gradients, a rank's shards (the ``to_local()`` of a DTensor).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.registration import launched_by

from . import reference
from .table import TensorTable

GRADIENT_TYPES = (torch.float32, torch.bfloat16)
COPY_TYPES = (torch.bfloat16, torch.float16)
PART = 32768
"""Number of values that the CPU implementation updates at a time, so that intermediate results stay in the cache."""

# --- public functions --------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the L2 norm of all gradients together, on their device.

    Squares and their sums are float64, so that they neither overflow nor underflow for any float32 values. The norm is
    infinite or NaN if a value is, or infinite if it exceeds float32. Two launches. Level B: the order of summation
    depends only on sizes. For gradients sharded over ranks, take the norm of the ranks' norms.

    Args:
        gradients: one or more contiguous tensors of any shapes, all float32 or all bf16.

    Returns:
        0-d float32.

    Raises:
        ValueError: a dtype, device or stride does not meet the requirements above; the message names the tensor.
    """
    lists = {"gradients": gradients}
    check_types(lists)
    return measure(gradients, TensorTable.of(lists))


@torch.no_grad()
def adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    counters: Tensor,
    lr: Tensor,
    norm: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    ema_decay: float = 0.9999,
    zero_gradients: bool = False,
) -> None:
    """Clip gradients, and update all parameters, moments, moving averages and rounded copies in two launches.

    Each value is read and written once. Let ``t`` be the number of steps taken, including this one. The scalars are
    computed in float64 and each rounded to float32 once: ``clip = min(1, max_norm / (norm + 1e-6))``,
    ``rate = lr / (1 - b1^t)``, ``root_scale = 1 / sqrt(1 - b2^t)``, ``decay = lr weight_decay`` and
    ``w = 1 - min(ema_decay, t / (9 + t))``. Then in float32, with every operation rounding separately (level A)::

        g = gradient * clip
        m = m + (1 - b1) (g - m)
        v = v + (1 - b2) (g g - v)
        p = p - (decay p + rate m / (sqrt(v) root_scale + eps))
        average = average + w (p - average)
        copy = p in the dtype of the copies

    If the norm is not finite, or is 2^63 or more after clipping, the step is skipped: only the counters change, and the
    gradients if they are zeroed.

    Args:
        parameters, exp_avgs, exp_avg_sqs: lists of the same length of contiguous float32 tensors of any shapes. Updates
            are fastest if they are aligned to 16 bytes. Parameters may require grad.
        gradients: like the parameters, all float32 or all bf16.
        averages: like the parameters, float32; may be empty.
        copies: like the parameters, all bf16 or all fp16; may be empty.
        counters: ``[3]`` int64: steps taken, steps skipped, and current number of steps skipped in a row.
        lr: learning rate, 0-d float32 or float64.
        norm: norm of all gradients before clipping, 0-d float32.
        betas, eps, weight_decay: hyperparameters of AdamW.
        max_norm: gradients are scaled down to at most this norm; ``inf`` disables clipping.
        ema_decay: upper limit of the averages' decay ``t / (9 + t)``.
        zero_gradients: whether to set the gradients to 0, even if the step is skipped.

    Raises:
        ValueError: a number, shape, dtype, device or stride does not meet the requirements above, or two tensors share
            memory; the message names it.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """
    lists = named_lists(parameters, gradients, exp_avgs, exp_avg_sqs, averages, copies)
    check_types(lists)
    settings = check_settings(betas, eps, weight_decay, max_norm, ema_decay)
    device = parameters[0].device if len(parameters) > 0 else counters.device
    check_numbers(counters, lr, norm, device)
    table = TensorTable.of(lists)
    apply_update(lists, counters, lr, norm, settings, zero_gradients, table)


def measure(gradients: Sequence[Tensor], table: TensorTable) -> Tensor:
    """:func:`gradient_norm` for validated gradients, which are the table's first row."""
    return _gradient_norm(gradients, table.pointers[:1], table.known[:1], table.chunks)


Settings = tuple[float, float, float, float, float, float]
"""``beta1, beta2, eps, weight_decay, max_norm, ema_decay``."""


def apply_update(
    lists: dict[str, Sequence[Tensor]],
    counters: Tensor,
    lr: Tensor,
    norm: Tensor,
    settings: Settings,
    zero_gradients: bool,
    table: TensorTable,
) -> None:
    """:func:`adamw_ema_` for validated arguments."""
    _adamw_ema(
        lists["parameters"],
        lists["gradients"],
        lists["exp_avgs"],
        lists["exp_avg_sqs"],
        lists.get("averages", []),
        lists.get("copies", []),
        counters,
        lr,
        norm,
        *settings,
        zero_gradients,
        table.pointers,
        table.known,
        table.chunks,
    )


def named_lists(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
) -> dict[str, Sequence[Tensor]]:
    """Return the lists by name in the order of the table's rows, without averages and copies if these are empty."""
    lists = {"gradients": gradients, "parameters": parameters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return lists | {name: some for name, some in (("averages", averages), ("copies", copies)) if len(some) > 0}


# --- validation --------------------------------------------------------------------------------------------


def check_types(lists: dict[str, Sequence[Tensor]]) -> None:
    """Validate each list's dtype by its first tensor; the table checks that all of a list's tensors have the same."""
    types = {"gradients": GRADIENT_TYPES, "copies": COPY_TYPES}
    for name, tensors in lists.items():
        expected = types.get(name, (torch.float32,))
        if len(tensors) > 0 and tensors[0].dtype not in expected:
            raise ValueError(f"{name}: got {tensors[0].dtype}, expected {' or '.join(str(t) for t in expected)}")


def check_settings(
    betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float, ema_decay: float
) -> Settings:
    """Validate the ranges of the hyperparameters and return them as floats; a NaN is out of every range."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers from 0 to below 1")
    if not 2.0**-126 <= eps < float("inf"):  # else denormal, or 0 / 0 where gradients are always 0
        raise ValueError(f"eps: got {eps}, expected a number of 2^-126 or more")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay: got {weight_decay}, expected a number of 0 or more")
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a number above 0")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay: got {ema_decay}, expected a number from 0 to 1")
    return float(betas[0]), float(betas[1]), float(eps), float(weight_decay), float(max_norm), float(ema_decay)


def check_numbers(counters: Tensor, lr: Tensor, norm: Tensor, device: torch.device) -> None:
    """Validate the three tensors of scalars that a step takes besides its lists."""
    floats = (torch.float32, torch.float64)
    wanted: tuple[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]], ...] = (
        ("counters", counters, (3,), (torch.int64,)),
        ("lr", lr, (), floats),
        ("norm", norm, (), (torch.float32,)),
    )
    for name, tensor, shape, dtypes in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: got {tensor.dtype}, expected {' or '.join(str(t) for t in dtypes)}")
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of the parameters ({device})")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous tensor")


# --- norm --------------------------------------------------------------------------------------------------


@custom_op("pixelflow::gradient_norm", mutates_args=(), device_types="cpu")
def _gradient_norm(gradients: Sequence[Tensor], pointers: Tensor, known: Tensor, chunks: Tensor) -> Tensor:
    return reference.gradient_norm(gradients)


@launched_by(_gradient_norm)
def _launch_gradient_norm(gradients: Sequence[Tensor], pointers: Tensor, known: Tensor, chunks: Tensor) -> Tensor:
    from . import kernels

    table = TensorTable(pointers, known, chunks).following([gradients])
    norm = torch.empty((), dtype=torch.float32, device=gradients[0].device)
    kernels.launch_norm(table.pointers, chunks, gradients[0].dtype, norm)
    return norm


@_gradient_norm.register_fake
def _fake_gradient_norm(gradients: Sequence[Tensor], pointers: Tensor, known: Tensor, chunks: Tensor) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float32)


# --- update ------------------------------------------------------------------------------------------------


@custom_op(
    "pixelflow::adamw_ema",
    mutates_args=("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages", "copies", "counters"),
    device_types="cpu",
)
def _adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    counters: Tensor,
    lr: Tensor,
    norm: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    ema_decay: float,
    zero_gradients: bool,
    pointers: Tensor,
    known: Tensor,
    chunks: Tensor,
) -> None:
    taken = int(counters[0])
    found = reference.numbers(
        norm.item(), lr.item(), taken, beta1, beta2, eps, weight_decay, max_norm, ema_decay
    )  # fmt: skip
    numbers, applied = torch.tensor(found, dtype=torch.float64, device="cpu").float(), bool(found[0])
    reference.count_(counters, applied)
    if applied:
        for tensors in zip(
            gradients, parameters, exp_avgs, exp_avg_sqs, *([averages] if averages else []), strict=True
        ):
            for gradient, p, m, v, *average in zip(*(tensor.view(-1).split(PART) for tensor in tensors), strict=True):
                new = reference.update(gradient, p, m, v, average[0] if averages else None, numbers)
                for part, value in zip((p, m, v, *average), new, strict=False):
                    part.copy_(value)
        for copy, parameter in zip(copies, parameters, strict=False):
            copy.copy_(parameter)
    if zero_gradients:
        for gradient in gradients:
            gradient.zero_()


@launched_by(_adamw_ema)
def _launch_adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    counters: Tensor,
    lr: Tensor,
    norm: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    ema_decay: float,
    zero_gradients: bool,
    pointers: Tensor,
    known: Tensor,
    chunks: Tensor,
) -> None:
    from . import kernels

    lists = named_lists(parameters, gradients, exp_avgs, exp_avg_sqs, averages, copies)
    table = TensorTable(pointers, known, chunks).following([*lists.values()])
    numbers = torch.empty(kernels.COUNT_OF_NUMBERS, dtype=torch.float32, device=norm.device)
    kernels.launch_numbers(
        norm,
        lr,
        counters,
        numbers,
        {
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
            "ema_decay": ema_decay,
        },
    )
    kernels.launch_update(
        table.pointers,
        chunks,
        numbers,
        gradients[0].dtype,
        copies[0].dtype if copies else None,
        bool(averages),
        zero_gradients,
    )


@_adamw_ema.register_fake
def _fake_adamw_ema(*_: object) -> None:
    """Return nothing; ``mutates_args`` declares the mutations."""
