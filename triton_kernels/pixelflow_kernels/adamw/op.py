"""Gradient norm and the update of a whole model: what they accept and which implementation runs.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``kernels``, imported when
it first runs: Triton is not installed everywhere). Neither waits for the device. Tensors are any that are contiguous:
parameters, views into a bucket of gradients, a rank's shards (of a DTensor, what ``to_local()`` gives).
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
"""Values that the plain implementation updates at a time, so that what it computes on the way stays in the cache."""

# --- public functions --------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, on their device.

    Squares and their sums are float64: they neither overflow nor vanish, whatever float32 values there are, and the
    norm is infinite or NaN where a value is (or where it exceeds float32). Two launches. Level B: sums run in an order
    that sizes alone decide. The ranks of sharded gradients take the norm of their norms.

    Args:
        gradients: one or more contiguous tensors of any shapes, all float32 or all bf16.

    Returns:
        0-d float32.

    Raises:
        ValueError: a type, device or stride is not as said; the message names the tensor.
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
    """Clip, AdamW, moving average and rounded copy of all parameters, each value read and written once. Two launches.

    With ``t`` the steps taken, this one included, in float64, each rounded to float32 once: ``clip = min(1, max_norm /
    (norm + 1e-6))``, ``rate = lr / (1 - b1^t)``, ``root_scale = 1 / sqrt(1 - b2^t)``, ``decay = lr weight_decay`` and
    ``w = 1 - min(ema_decay, t / (9 + t))``. Then in float32, every operation rounding by itself (level A)::

        g = gradient * clip
        m = m + (1 - b1) (g - m)
        v = v + (1 - b2) (g g - v)
        p = p - (decay p + rate m / (sqrt(v) root_scale + eps))
        average = average + w (p - average)
        copy = p in the copies' type

    A norm that is not finite (or, not clipped, is 2^63 or more) changes nothing but the counters and gradients that are
    to be zero.

    Args:
        parameters, exp_avgs, exp_avg_sqs: float32 tensors of any shapes, as many of each, contiguous. Alignment to 16
            bytes makes them fast. Parameters may require grad.
        gradients: like the parameters, all float32 or all bf16.
        averages: like the parameters, float32; or none.
        copies: like the parameters, all bf16 or all fp16; or none.
        counters: ``[3]`` int64: steps taken, steps skipped, steps skipped in a row up to now.
        lr: 0-d float32 or float64: the learning rate.
        norm: 0-d float32, of all gradients before they are clipped.
        betas, eps, weight_decay: of AdamW.
        max_norm: gradients are scaled to this norm at most; ``inf`` never scales.
        ema_decay: the limit that ``t / (9 + t)`` rises to.
        zero_gradients: gradients are 0 afterwards, those of a step that changes nothing too.

    Raises:
        ValueError: a number, shape, type, device or stride is not as said, or two tensors share memory; the message
            names it.

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
    """:func:`gradient_norm` of what has been checked; the table begins with the gradients."""
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
    """:func:`adamw_ema_` of what has been checked."""
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
    """In the order of the table's rows; empty averages and copies are left out."""
    lists = {"gradients": gradients, "parameters": parameters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return lists | {name: some for name, some in (("averages", averages), ("copies", copies)) if len(some) > 0}


# --- checks at the door ------------------------------------------------------------------------------------


def check_types(lists: dict[str, Sequence[Tensor]]) -> None:
    """Masters, moments and averages in float32, copies in less; that a list has one type, its table checks."""
    types = {"gradients": GRADIENT_TYPES, "copies": COPY_TYPES}
    for name, tensors in lists.items():
        expected = types.get(name, (torch.float32,))
        if len(tensors) > 0 and tensors[0].dtype not in expected:
            raise ValueError(f"{name}: got {tensors[0].dtype}, expected {' or '.join(str(t) for t in expected)}")


def check_settings(
    betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float, ema_decay: float
) -> Settings:
    """Numbers of AdamW, of clipping and of the average in their ranges; a NaN is in none."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers from 0 to below 1")
    if not 2.0**-126 <= eps < float("inf"):  # a denormal, and 0 / 0 of a value whose gradient was always 0
        raise ValueError(f"eps: got {eps}, expected a number of 2^-126 or more")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay: got {weight_decay}, expected a number of 0 or more")
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a number above 0")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay: got {ema_decay}, expected a number from 0 to 1")
    return float(betas[0]), float(betas[1]), float(eps), float(weight_decay), float(max_norm), float(ema_decay)


def check_numbers(counters: Tensor, lr: Tensor, norm: Tensor, device: torch.device) -> None:
    """The three tensors of numbers that a step takes beside its lists."""
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
    norm = torch.empty((), device=gradients[0].device)
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
    numbers, applied = torch.tensor(found, dtype=torch.float64).float(), bool(found[0])
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
    numbers = torch.empty(kernels.COUNT_OF_NUMBERS, device=norm.device)
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
    """It gives nothing; what it changes, its declaration says."""
