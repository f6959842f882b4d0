"""Specimens of rope2d for the ahead-of-time report: each kernel at the published widths and the bundled model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPES = ((1152, 72), (1024, 64), (2048, 128), (144, 72))  # channels, head dim; the last is the bundled model's


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield every kernel with every dtype at the published width, and with bf16 and fp32 at the other widths."""
    from .backward import _rope2d_backward_kernel as backward
    from .forward import _rope2d_forward_kernel as forward
    from .rotation import _rotate_kernel as rotate

    for dtype in TYPES:
        for width, head_dim in SHAPES if dtype in ("bf16", "fp32") else SHAPES[:1]:
            shape = (dtype, width, head_dim, arch)
            yield _specimen("rotate", rotate, {"CONJUGATE": False}, *shape)
            yield _specimen("rotate", rotate, {"CONJUGATE": True}, *shape, variant="_back")
            for variant, rotate_k in (("", True), ("_cross", False)):
                flags = {"ROTATE_K": rotate_k, "EPS": 1e-6}
                yield _specimen("forward", forward, flags, *shape, variant=variant)
                yield _specimen("backward", backward, flags, *shape, variant=variant)


def _specimen(
    name: str, kernel: Any, flags: dict[str, Any], dtype: str, width: int, head_dim: int, arch: int, variant: str = ""
) -> Specimen:
    from .rotation import shape_class, tile_of

    tile = tile_of(width)
    config = launch_config(f"rope2d.{name}", shape_class(width, TYPES[dtype]), arch)
    # Wide loads are promised only for those portions of each part of a token that fill all threads with 16 bytes each:
    # the last 128 of 1152 channels are 8 bytes per lane in a two-byte dtype, and the bundled model's 16 are fewer.
    round_of_threads = 16 * 32 * config["num_warps"]
    wide = sum(part * TYPES[dtype].itemsize // round_of_threads for part in tile.values())
    tokens = {"rotate": 1, "forward": 2, "backward": 4}[name]
    return Specimen(
        name=f"rope2d.{name}{variant}/{dtype}/c{width}-d{head_dim}",
        kernel=kernel,
        types={argument: found for argument in kernel.arg_names if (found := _type(argument, dtype))},
        constants=flags | tile | {"WIDTH": width, "HEAD_DIM": head_dim},
        options=config | {"enable_fp_fusion": name != "rotate"},
        promises=Promises(
            wide_loads=tokens * wide,
            narrow=0 if width >= 1024 else None,
            ffma=0 if name == "rotate" else None,  # level A
            flushes=0 if name == "rotate" else None,
            shared=0 if config["num_warps"] == 1 else None,
        ),
    )


def _type(argument: str, dtype: str) -> str | None:
    if argument in ("row_ptr", "column_ptr"):
        return "*i32"
    if argument.endswith("_ptr"):
        high = argument == "table_ptr" or "weight" in argument or "partial" in argument
        return f"*{'fp64' if dtype == 'fp64' else 'fp32'}" if high else f"*{dtype}"
    return "i32" if argument.startswith(("stride", "num", "tokens")) else None
