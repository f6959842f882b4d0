"""Classes of kernels, or of operators on a CPU, by the names that torch.profiler reports."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pixelflow_benchmarks.harness.tracing import FREE, PRODUCTS

Class = Literal["products", "attention", "pointwise", "copies", "other", "idle"]

CLASSES: tuple[Class, ...] = ("products", "attention", "pointwise", "copies", "other", "idle")
"""On a CPU, ``other`` includes operators that make views or uninitialised tensors, or only call other operators.
``idle`` has no kernels: it is the rest of the wall time."""

OURS: dict[Class, tuple[str, ...]] = {
    "attention": (
        "_attention_forward_kernel", "_delta_kernel", "_backward_keys_kernel", "_backward_queries_kernel",
    ),
    "pointwise": (
        "_modulate_forward_kernel", "_modulate_backward_kernel", "_sum_kernel",
        "_rope2d_forward_kernel", "_rope2d_backward_kernel", "_rotate_kernel",
        "_euler_kernel", "_stage_kernel", "_accept_kernel",
        "_begin_kernel", "_end_kernel", "_error_kernel", "_start_kernel", "_finish_kernel",
        "_initial_kernel", "_renoise_kernel", "_pair_kernel",
        "_squares_kernel", "_norm_kernel", "_numbers_kernel", "_update_kernel",
    ),
}  # fmt: skip
"""The Triton kernels that :mod:`pixelflow_kernels` launches."""

PASSES = {"_rope2d_forward_kernel": 1 / 3, "_modulate_forward_kernel": 2 / 3}
"""Share of these kernels in a block's three fused passes, which are what the pointwise floor counts."""

_KERNELS: tuple[tuple[Class, str], ...] = (
    # Inductor's names list the operations that were fused, products among them, so that they must be matched first.
    ("attention", r"^triton_tem_.*attention"),
    ("products", r"^triton_tem_"),
    ("pointwise", r"^triton_(poi|red|per|for)_|(^|_)cpp_fused_|^## Call CompiledFxGraph"),
    ("copies", r"^mem(cpy|set)\b|direct_copy_kernel|CatArrayBatchedCopy|FillFunctor"),
    ("copies", r"index_elementwise_kernel|indexSelect|gather_kernel"),
    ("attention", r"flash|fmha|sdpa|attention"),  # before products: CUTLASS has attention too
    ("products", r"nvjet|gemm|gemv|cutlass|cublas|splitKreduce|^mkldnn::|^mkl::|^pixelflow::.*linear"),
    ("pointwise", r"at::native::|^pixelflow::"),
)
_MULTIPLYING = PRODUCTS | {"mkldnn_convolution", "_slow_conv2d_forward"}
_COPYING = {"copy_", "fill_", "cat", "index", "index_select", "gather"}
_CALLING = {
    "linear", "matmul", "scaled_dot_product_attention", "layer_norm", "convolution", "_convolution", "conv2d",
    "_to_copy", "clone", "repeat", "stack", "zero_", "embedding",
}  # fmt: skip
"""Operators that leave their work to the operators that they call."""


def class_of(name: str) -> Class:
    """Return the class of a kernel, or of an operator on a CPU."""
    for known, names in OURS.items():
        if name in names:
            return known
    if name.startswith("aten::"):
        return _operator_class(name.removeprefix("aten::"))
    for found, pattern in _KERNELS:
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return "other"


def _operator_class(name: str) -> Class:
    if name in FREE | _CALLING or _is_view(name):
        return "other"
    if name in _MULTIPLYING:
        return "products"
    if name in _COPYING:
        return "copies"
    return "attention" if "attention" in name else "pointwise"


def _is_view(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(getattr(packet, overload).is_view for overload in packet.overloads())


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel, or an operator without the operators that it calls.

    Attributes:
        name: name reported by the profiler.
        calls: number of calls.
        seconds: seconds of all calls together.
    """

    name: str
    calls: int
    seconds: float

    @property
    def kind(self) -> Class:
        """Class of the kernel or operator."""
        return class_of(self.name)


def busy_rows(averages: Iterable[Any], on_gpu: bool) -> list[Row]:
    """Return what kept the device busy, longest first.

    Args:
        averages: what ``profiler.key_averages()`` returns. On a GPU it holds kernels, the operators that launched them
            (with the device time of the same kernels) and the ranges around both: only kernels are counted.
        on_gpu: whether to return kernels; otherwise operators on the CPU.
    """
    averages, device = list(averages), "CUDA" if on_gpu else "CPU"
    ranges = {event.key for event in averages if event.is_user_annotation}
    rows = []
    for event in averages:
        if event.device_type.name != device or event.key in ranges:
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0:
            rows.append(Row(event.key, event.count, micros / 1e6))
    return sorted(rows, key=lambda row: -row.seconds)
