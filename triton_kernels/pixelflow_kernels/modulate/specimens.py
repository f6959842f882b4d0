"""Specimens of modulate for the ahead-of-time report: each variant at the published widths and the bundled model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = {1152: ("bf16", "fp16", "fp32"), 1024: ("bf16", "fp32"), 144: ("bf16", "fp32")}

# The operands that a variant lacks in the forward kernel and in the backward kernel.
VARIANTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layer_norm_modulate": (
        ("y_ptr", "gate_ptr", "weight_ptr", "residual_ptr"),
        ("grad_residual_ptr", "y_ptr", "gate_ptr", "weight_ptr", "grad_y_ptr", "partial_gate_ptr"),
    ),
    "add_gated_layer_norm_modulate": (("weight_ptr",), ("weight_ptr",)),
    "add_gated_rms_norm_modulate": ((), ()),
    "add_gated_rms_norm": (("shift_ptr", "scale_ptr"), ("scale_ptr", "partial_shift_ptr")),
    "add_rms_norm_modulate": (("gate_ptr",), ("y_ptr", "gate_ptr", "grad_y_ptr", "partial_gate_ptr")),
}
_HIGH = ("gate_ptr", "weight_ptr", "shift_ptr", "scale_ptr")
_LOADED = {
    "forward": (*_HIGH, "x_ptr", "y_ptr"),
    "backward": (*_HIGH, "y_ptr", "grad_ptr", "grad_residual_ptr", "residual_ptr"),
}


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield every kernel, variant, dtype and width."""
    for width, types in WIDTHS.items():
        for dtype in types:
            for variant, without in VARIANTS.items():
                yield _specimen("forward", variant, without[0], dtype, width, arch)
                yield _specimen("backward", variant, without[1], dtype, width, arch)
        yield _sum(width, arch)


def _specimen(direction: str, variant: str, without: tuple[str, ...], dtype: str, width: int, arch: int) -> Specimen:
    from . import backward, forward

    is_forward = direction == "forward"
    kernel = forward._modulate_forward_kernel if is_forward else backward._modulate_backward_kernel
    types = {n: t for n in kernel.arg_names if n not in without and (t := _type(n, dtype))}
    constants, options = _split(f"modulate.{direction}", forward.shape_class(width, TYPES[dtype]), arch)
    parts = forward.parts_of(width)
    # Only portions that fill all lanes with 16 bytes each: the last 128 of 1152 channels take fewer in two-byte dtypes.
    lanes = 32 * options["num_warps"]
    loads = [4 if t == "*fp32" else 2 for n, t in types.items() if n in _LOADED[direction]]
    wide = sum(part * size // 16 // lanes for size in loads for part in parts.values())
    whole_warps = is_forward and width >= 1024  # in the backward pass, a lane may hold 1 of the last 128
    return Specimen(
        name=f"modulate.{direction}.{variant}/{dtype}/c{width}",
        kernel=kernel,
        types=types,
        constants=dict.fromkeys(without) | {"EPS": 1e-6, "WIDTH": width} | parts | constants,
        options=options | {"enable_fp_fusion": not is_forward},
        promises=Promises(
            wide_loads=wide,
            narrow=0 if whole_warps else None,
            # The residual is level A. In two-byte dtypes its product is rounded before the addition; what Triton 3.6.0
            # fuses on sm_100 despite the option is the modulation.
            ffma=0 if is_forward and dtype == "fp32" else None,
            shared=0 if is_forward else None,
            registers=96 if is_forward else 128,
        ),
    )


def _sum(width: int, arch: int) -> Specimen:
    from . import backward, forward

    constants, options = _split("modulate.sum", "any", arch)
    constants["TOKENS"] = _split("modulate.backward", forward.shape_class(width, torch.float32), arch)[0]["TOKENS"]
    types = {"partial_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "out_ptr": "*fp32"}
    return Specimen(
        name=f"modulate.sum/fp32/c{width}",
        kernel=backward._sum_kernel,
        types=types | {"num_slots": "i32", "num_images": "i32"},
        constants=constants | {"WIDTH": width},
        options=options | {"enable_fp_fusion": True},
        promises=Promises(wide_loads=1, narrow=0),
    )


def _split(kernel: str, shape_class: str, arch: int) -> tuple[dict[str, int], dict[str, int]]:
    """Split a launch configuration into constexpr arguments and compiler options."""
    config = launch_config(kernel, shape_class, arch)
    return {n: v for n, v in config.items() if n.isupper()}, {n: v for n, v in config.items() if not n.isupper()}


def _type(name: str, dtype: str) -> str | None:
    if name in ("image_index_ptr", "cu_seqlens_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32" if name in _HIGH or name.startswith("partial") else f"*{dtype}"
    return "i32" if name.startswith(("stride", "num")) else None
