"""What the ahead-of-time report compiles of rope2d: each kernel at the published widths and the small model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = ("bf16", "fp16", "fp32")
SHAPES = ((1152, 72), (1024, 64), (64, 16))  # channels, head dim


def specimens(arch: int) -> Iterator[Specimen]:
    """Every kernel, type and shape; the same for all architectures."""
    from . import kernels

    for dtype in TYPES:
        for width, head_dim in SHAPES:
            variants: tuple[tuple[str, Any, dict[str, Any], int], ...] = (
                ("rotate", kernels._rotate_kernel, {"CONJUGATE": False}, 1),
                ("rotate_back", kernels._rotate_kernel, {"CONJUGATE": True}, 1),
                ("forward", kernels._forward_kernel, {"ROTATE_K": True, "EPS": 1e-6}, 2),
                ("forward_cross", kernels._forward_kernel, {"ROTATE_K": False, "EPS": 1e-6}, 2),
                ("backward", kernels._backward_kernel, {"ROTATE_K": True, "EPS": 1e-6}, 4),
                ("backward_cross", kernels._backward_kernel, {"ROTATE_K": False, "EPS": 1e-6}, 4),
            )
            for name, kernel, flags, tensors in variants:
                yield _specimen(name, kernel, dtype, width, head_dim, flags, tensors)


def _specimen(
    name: str, kernel: Any, dtype: str, width: int, head_dim: int, flags: dict[str, Any], tensors: int
) -> Specimen:
    from . import kernels

    tile = kernels.Tile.of(width)
    # One token by 32 lanes. The last 128 of 1152 channels in two-byte types take 8 bytes a lane, the 32 + 32 of the
    # small model less: only whole rounds of 512 bytes are promised wide.
    size = 4 if dtype == "fp32" else 2
    threads = 32 * tile.num_warps
    wide = sum(part * size // 16 // threads for part in (tile.main, tile.tail))
    level_a = name.startswith("rotate")
    return Specimen(
        name=f"rope2d.{name}/{dtype}/c{width}-d{head_dim}",
        kernel=kernel,
        types={n: t for n in kernel.arg_names if (t := _type(n, dtype))},
        constants=flags | {"WIDTH": width, "HEAD_DIM": head_dim, "MAIN": tile.main, "TAIL": tile.tail},
        options={"num_warps": tile.num_warps, "enable_fp_fusion": not level_a},
        promises=Promises(
            wide_loads=tensors * wide,
            narrow=0 if width >= 1024 else None,
            ffma=0 if level_a else None,
            shared=0,
        ),
    )


def _type(name: str, dtype: str) -> str | None:
    if name in ("row_ptr", "column_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        high = name == "table_ptr" or "weight" in name or "partial" in name
        return "*fp32" if high else f"*{dtype}"
    return "i32" if name.startswith(("stride", "num", "tokens")) else None
