"""Specimens of varlen_attention for the ahead-of-time report: every pass at the published and other head dims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (72, 64, 24, 80, 96, 128, 256)
PER_SCORE = 7.0  # instructions per score of the forward pass on sm_90, for a head dim with dead lanes


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield all passes, tile-aligned and ragged (more registers); less common dtypes and head dims only ragged."""
    for dtype in TYPES:
        for head_dim in HEAD_DIMS:
            main = dtype == "bf16" and head_dim in (64, 72)
            if dtype != "bf16" and head_dim != 72:
                continue
            for aligned in (True, False) if main else (False,):
                yield _specimen("forward", dtype, head_dim, arch, aligned, 4096)
                if main:
                    yield _specimen("forward", dtype, head_dim, arch, aligned, 64)
                yield _specimen("backward_keys", dtype, head_dim, arch, aligned)
                yield _specimen("backward_queries", dtype, head_dim, arch, aligned)
            if main:
                # The loop without the fixed maximum. The savings of row sums from dead lanes show in comparison with
                # head dim 80, which has as many lanes as 72 but no dead ones.
                yield _specimen("forward", dtype, head_dim, arch, True, 4096, "-running", {"FIXED_MAX_TILES": 0})
            yield _specimen("backward_delta", dtype, head_dim, arch)


def _specimen(
    name: str,
    dtype: str,
    head_dim: int,
    arch: int,
    aligned: bool = False,
    max_seqlen: int | None = None,
    variant: str = "",
    change: Mapping[str, int] | None = None,
) -> Specimen:
    from . import backward, forward
    from .tiles import Lanes, shape_class

    kernels = {
        "forward": forward._attention_forward_kernel,
        "backward_delta": backward._delta_kernel,
        "backward_keys": backward._backward_keys_kernel,
        "backward_queries": backward._backward_queries_kernel,
    }
    kernel, lanes = kernels[name], Lanes.of(head_dim)
    config = launch_config(f"varlen_attention.{name}", shape_class(TYPES[dtype], head_dim, max_seqlen), arch)
    length = "" if max_seqlen is None else "-short" if max_seqlen == 64 else "-long"
    config = {"FIXED_MAX_TILES": 0} | config | dict(change or {})
    constants = {
        "UNIT": 8,
        "SCALE": head_dim**-0.5,
        "GROWTH": forward.GROWTH[TYPES[dtype]],
        "NUM_HEADS": 16,
        "HEAD_DIM": head_dim,
        "MAIN": lanes.main,
        "TAIL": lanes.tail,
        "ALIGNED": aligned,
        "HAS_GRAD_LSE": False,
    } | {key: value for key, value in config.items() if key.isupper()}
    products = name != "backward_delta"
    # fp32 products take three passes with operands in registers, and spill; so do head dims of 128 and more on sm_80.
    half = dtype != "fp32"
    types = {argument: found for argument in kernel.arg_names if (found := _type(argument, dtype))}
    dead = lanes.main + lanes.tail > head_dim
    return Specimen(
        name=f"varlen_attention.{name}{variant}{length}/{dtype}/d{head_dim}{'-aligned' if aligned else ''}",
        kernel=kernel,
        types=types,
        constants={argument: constants[argument] for argument in kernel.arg_names if argument in constants},
        options={key: value for key, value in config.items() if not key.isupper()} | {"enable_fp_fusion": True},
        unaligned=tuple(argument for argument in types if argument.startswith("stride")),
        promises=Promises(
            spills=0 if half and (head_dim < 128 or arch != 80) else None,
            narrow=0,
            wide_loads=4 if head_dim >= 64 else 1,  # shorter rows are partly loaded 8 bytes at a time
            matrix=products,
            per_score=PER_SCORE if (name, arch, aligned, dead, variant) == ("forward", 90, True, True, "") else None,
        ),
        scores_per_thread=config["BLOCK_M"] * config["BLOCK_N"] / (32 * config["num_warps"]) if products else None,
    )


def _type(argument: str, dtype: str) -> str | None:
    if argument.startswith("cu_"):
        return "*i32"
    if argument.endswith("_ptr"):
        return "*fp32" if "lse" in argument or "delta" in argument else f"*{dtype}"
    return "i32" if argument.startswith(("stride", "num")) else None
